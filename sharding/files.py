"""Atomic file writes, checksums and a lock between processes."""

import errno
import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from sharding.errors import UserError

TEMPORARY_SUFFIX = ".tmp"


def fsync_dir(path: Path | str) -> None:
    """Flush a directory's entries to disk, so that a rename inside it survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_file(path: Path | str) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path`; when the block ends without error it is flushed and renamed to `path`, else removed.

    Readers see the old file or the complete new one. Raises OSError when the disk is full or not writable.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    try:
        with temporary.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename in (None, str(temporary)):
            error.filename = str(path)  # the error of a failed write names no file; that of another file names it
        with suppress(OSError):  # the first error is the one to report
            temporary.unlink()
        raise
    fsync_dir(path.parent)


def write_atomic(path: Path | str, data: bytes) -> None:
    """Write `data` to `path` atomically (temporary name, flush, rename, flush of the directory)."""
    with atomic_file(path) as stream:
        stream.write(data)


def link_atomic(path: Path, target: Path) -> None:
    """Make `path` a symbolic link to `target`, atomically replacing what was there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(path)
    fsync_dir(path.parent)


def sha256_file(path: Path | str) -> str:
    """Return the sha256 of a file's content as 64 hex digits. Raises OSError when it cannot be read."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def remove_temporaries(directory: Path) -> None:
    """Remove what `atomic_file` left in `directory` when its process was killed."""
    for path in directory.glob(f".*{TEMPORARY_SUFFIX}"):
        path.unlink(missing_ok=True)


@contextmanager
def exclusive_lock(path: Path, busy: str) -> Iterator[None]:
    """Hold an exclusive lock on `path`, which is created, during the block; the kernel frees it if the process dies.

    Raises UserError with the message `busy` when another process holds it. On a file system without locks the block
    runs without one, because otherwise nothing could be built there.
    """
    while True:
        with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "rb") as stream:
            if not flock(stream.fileno(), wait=False):
                raise UserError(busy)
            # The last holder may have removed the file between our open and our lock; then our lock is on a deleted file.
            if path.exists() and os.path.samestat(os.fstat(stream.fileno()), path.stat()):
                yield
                return


def flock(descriptor: int, wait: bool) -> bool:
    """Lock an open file among the processes of this host; without `wait`, return False at once if another holds it.

    On a file system without locks the answer is always True.
    """
    flags: Any = fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB)
    try:
        fcntl.flock(descriptor, flags)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            raise
    return True
