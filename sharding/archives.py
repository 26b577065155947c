"""Opens a directory or an archive (.tar, .zip), recognized by its content."""

import importlib
import shutil
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from sharding.containers import DirectoryFiles, Files, TarFiles, ZipFiles
from sharding.errors import UserError
from sharding.kinds import compression, unread
from sharding.listing import UNPACKED
from sharding.tars import BLOCK, is_tar, writable

_OPENERS = {"gzip": ["gzip"], "bzip2": ["bz2"], "xz": ["lzma"]}
_OPENERS |= {"zstd": ["compression.zstd", "backports.zstd", "zstandard"]}
"""Compression program → modules that open its files; the first one installed is used."""
_SUFFIXES = (".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tgz", ".tbz2", ".txz", ".tar", ".zip")
_READ = "give a directory, a .tar (.gz, .bz2, .xz), or a .zip"


def open_files(argument: str, scratch: Path) -> Files:
    """Open a directory or an archive, recognized by its content; a compressed tar is decompressed once into `scratch`.

    Raises UserError when the path is missing, of no known kind, or damaged.
    """
    path = Path(argument)
    if not path.exists():
        raise UserError(f"{path} does not exist; check the path")
    if path.is_dir():
        return DirectoryFiles(path.absolute(), path)
    if not path.is_file():
        raise UserError(f"{path} is a pipe, a socket or a device; give a directory or a file")
    try:
        with path.open("rb") as stream:
            head = stream.read(BLOCK)
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); check its permissions") from None
    if not head:
        raise UserError(f"{path} is empty; download it again")
    if is_tar(head):
        return TarFiles(path.absolute(), path)
    program = compression(head) or ""
    for module in _OPENERS.get(program, ()):
        with suppress(ImportError):
            return TarFiles(_decompress(path, importlib.import_module(module).open, scratch), path)
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")) or zipfile.is_zipfile(path):
        return ZipFiles(path.absolute(), path)
    if kind := unread(head, str(path)):
        raise UserError(f"{path} is {kind}")
    raise UserError(f"{path} is not a complete tar archive or any other supported format; {_READ}")


def base_name(argument: str) -> str:
    """Return a path's last name without an archive suffix, and with bytes that are not UTF-8 escaped."""
    path = Path(argument).resolve()
    suffix = next((suffix for suffix in _SUFFIXES if path.name.lower().endswith(suffix) and not path.is_dir()), "")
    return writable(path.name[: len(path.name) - len(suffix)]) or "folder"


def _decompress(path: Path, opener: Any, scratch: Path) -> Path:
    target = (scratch / UNPACKED).absolute()
    try:
        with opener(path, "rb") as source, target.open("wb") as out:
            shutil.copyfileobj(source, out, 2**20)
    # Decompressors raise exceptions of many types for damaged files; only a disk error has an errno.
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(f"{path} is damaged ({error}); download it again") from None
    with target.open("rb") as stream:
        if not is_tar(stream.read(BLOCK)):
            raise UserError(f"{path} is compressed, but does not contain a complete tar archive; {_READ}")
    return target
