"""Downloads one file from a store: complete, checked, with retries; and a lock between the processes of a host."""

import errno
import os
import random
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from gdd_dist.runtime.monitor import say
from sharding.errors import UserError
from sharding.files import flock, sha256_file

Result = TypeVar("Result")

FIRST_PAUSE, LONGEST_PAUSE = 0.25, 30.0
_SILENCE = 60.0
"""Seconds without data after which a connection is closed and tried again."""
MISMATCHES = 5
"""After so many complete downloads with a wrong sha256, the file itself must be different."""
LOCAL_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class Damaged(Exception):
    """The downloaded content does not match the manifest."""


class Source:
    """The files below a URL, read with fsspec."""

    def __init__(self, url: str, patience: float) -> None:
        """``patience``: seconds for which a store may fail. Raises UserError when the library for the URL is missing."""
        self._url, self._patience = url.rstrip("/"), patience
        try:
            import fsspec

            options = {"use_listings_cache": False, "skip_instance_cache": True, **_limits(url, patience)}
            self._fs, root = fsspec.core.url_to_fs(self._url, **options)
        except ImportError as e:
            what = f"--data {url} needs {e.name or 'a library'}"
            raise UserError(f"{what}; pip install fsspec s3fs gcsfs aiohttp") from None
        except ValueError as e:
            raise UserError(f"--data {url} is not a URL that can be read ({e}); check it") from None
        self._root = str(root).rstrip("/")

    def content(self, file: str) -> bytes:
        """Return the content of a small file."""
        return self._patiently(file, lambda: bytes(self._fs.cat_file(f"{self._root}/{file}")))

    def download(self, file: str, path: Path, size: int | None, sha256: str) -> None:
        """Download to ``path``, checked and atomically. The caller holds its lock."""
        temporary = path.with_name(f".{path.name}.tmp")

        def once() -> None:
            self._fs.get_file(f"{self._root}/{file}", str(temporary))
            found = temporary.stat().st_size
            if size is not None and found != size:
                raise Damaged(f"received {found} bytes instead of {size}")
            if sha256_file(temporary) != sha256:
                raise Damaged("its sha256 differs from the manifest")
            temporary.replace(path)

        try:
            self._patiently(file, once)
        finally:
            temporary.unlink(missing_ok=True)

    def _patiently(self, file: str, call: Callable[[], Result]) -> Result:
        begin, pause, mismatches = time.monotonic(), FIRST_PAUSE, 0
        while True:
            try:
                return call()
            # Stores raise exceptions of many libraries; every error that may be temporary is tried again.
            except Exception as e:
                if isinstance(e, OSError) and e.errno in LOCAL_FAULTS:
                    raise
                mismatches += isinstance(e, Damaged)
                late = time.monotonic() - begin + pause > self._patience
                lasting = isinstance(e, FileNotFoundError) or _forbidden(e) or _untrusted(e)
                if late or mismatches >= MISMATCHES or lasting:
                    raise UserError(f"cannot fetch {self._url}/{file} ({_reason(e)}); {_remedy(e)}") from e
                say(f"{self._url}/{file}: {_reason(e)}; trying again in {pause:.1f} s")
            time.sleep(pause * random.uniform(0.75, 1.25))
            pause = min(2 * pause, LONGEST_PAUSE)


def _limits(url: str, patience: float) -> dict[str, Any]:
    """Return options that make a silent store an error within ``patience`` seconds; by default, libraries wait for minutes."""
    scheme, seconds = url.partition("://")[0].lower(), max(1.0, min(patience, _SILENCE))
    if scheme.startswith("http"):
        import aiohttp

        limit = aiohttp.ClientTimeout(total=None, sock_connect=seconds, sock_read=seconds)
        return {"client_kwargs": {"timeout": limit}}
    return {"config_kwargs": {"connect_timeout": seconds, "read_timeout": seconds}} if scheme.startswith("s3") else {}


def _reason(e: Exception) -> str:
    return " ".join(str(e).split())[:200] or type(e).__name__


def _forbidden(e: Exception) -> bool:
    """Whether access was refused, as reported by s3fs, aiohttp (in `status`) and gcsfs (in `code`, or only in words)."""
    codes = {getattr(e, "status", None), getattr(e, "code", None)}
    return isinstance(e, PermissionError) or bool(codes & {401, 403}) or str(e).startswith("Forbidden: ")


def _untrusted(e: BaseException) -> bool:
    """Whether a certificate was refused; fsspec and aiohttp wrap that in their own exceptions."""
    cause = e.__cause__ or e.__context__
    return isinstance(e, ssl.SSLCertVerificationError) or (cause is not None and _untrusted(cause))


def _remedy(e: Exception) -> str:
    if _untrusted(e):
        cure = "check the URL, or set SSL_CERT_FILE to the certificate of its authority"
        return f"its certificate is not trusted here: {cure}"
    if isinstance(e, FileNotFoundError):
        return "check the URL, or copy the whole data set there"
    if _forbidden(e):
        return "check the credentials"
    if isinstance(e, Damaged):
        return "copy the data set there again"
    return "check the store and the network, then run the same command again"


def whole(path: Path, size: int | None, sha256: str | None = None) -> bool:
    """Whether the file exists, with the given size and sha256 if they are given."""
    try:
        return (size is None or path.stat().st_size == size) and (sha256 is None or sha256_file(path) == sha256)
    except FileNotFoundError:
        return False


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of ``path`` among the processes of this host, and yield True; without ``wait``, yield False if it is held.

    The kernel frees it when its holder dies. On a file system without locks all get it; at worst, a file is downloaded twice.
    """
    descriptor = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        yield flock(descriptor, wait)
    finally:
        os.close(descriptor)
