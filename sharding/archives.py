"""Directories and archives (.tar, .zip) read in place through one interface."""

import bz2
import gzip
import lzma
import os
import posixpath
import shutil
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sharding.errors import UserError
from sharding.tars import tree

# An encoded image larger than this is taken for damage, or for an attempt to fill the memory.
LARGEST_FILE = 256 * 2**20
_COMPRESSED = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
_SUFFIXES = (".tar.gz", ".tar.bz2", ".tar.xz", ".tgz", ".tar", ".zip")


@dataclass(frozen=True, slots=True)
class Member:
    """A file: its name inside the source with forward slashes, size in bytes, and where it starts, if that is known."""

    name: str
    size: int
    offset: int = -1


@dataclass(frozen=True, slots=True)
class TarMember(Member):
    """A file in one of several tars. `name` starts with the tar's, as messages show it."""

    tar: int = 0


class Files(ABC):
    """A directory or an archive. An object can be sent to another process, which opens the files for itself."""

    def __init__(self, path: Path, shown: Path | None = None) -> None:
        """`shown` is the path that messages name, where it is not `path`."""
        self.path, self.shown = path, shown or path

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "shown": self.shown}

    @abstractmethod
    def listing(self) -> tuple[list[Member], set[str]]:
        """Return all files, sorted by name, and the names of directories, which need not be complete."""

    @abstractmethod
    def read_any(self, member: Member) -> bytes:
        """Return a file's content. Raises OSError or ValueError with the reason when it cannot be read."""

    def read(self, member: Member) -> bytes:
        """Return a file's content of at most LARGEST_FILE bytes. Raises OSError or ValueError with the reason."""
        if member.size > LARGEST_FILE:
            raise ValueError(f"larger than {LARGEST_FILE >> 20} MiB")
        return self.read_any(member)


class DirectoryFiles(Files):
    """A directory. Symbolic links are followed."""

    def listing(self) -> tuple[list[Member], set[str]]:
        """Return all files and all directories below the directory."""
        members: list[Member] = []
        directories: set[str] = set()
        entered: set[str] = set()
        for folder, names, files in os.walk(self.path, followlinks=True, onerror=_fail):
            # A link to a directory above would be walked for ever.
            real = os.path.realpath(folder)
            if real in entered and any(real == os.path.realpath(up) for up in Path(folder).parents):
                names.clear()
                continue
            entered.add(real)
            relative = os.path.relpath(folder, self.path)
            prefix = "" if relative == "." else relative.replace(os.sep, "/") + "/"
            directories.update(prefix + name for name in names)
            for name in files:
                path = os.path.join(folder, name)
                # A dangling link has no size; reading it names it.
                members.append(Member(prefix + name, os.path.getsize(path) if os.path.exists(path) else 0))
        return _ordered(members), directories

    def read_any(self, member: Member) -> bytes:
        """Return the file's content."""
        return (self.path / member.name).read_bytes()


class TarFiles(Files):
    """An uncompressed tar. Its members are read at their offsets, by any number of processes at once."""

    _descriptor: int | None = None

    def listing(self) -> tuple[list[Member], set[str]]:
        """Return all files and directories. Raises UserError when it is cut, damaged or holds what is no data."""
        members: dict[str, Member] = {}
        directories, links = set(), {}
        try:
            for entry in tree(self.path):
                name = posixpath.normpath(entry.name)
                if entry.is_file:
                    members[name] = Member(name, entry.size, entry.offset)
                elif entry.target:
                    links[name] = entry.target
                else:
                    directories.add(name)
        except (ValueError, OSError) as error:
            raise UserError(f"{self.shown} is not a whole tar archive ({error}); get it again") from None
        for name, target in links.items():
            found = members.get(target)
            members[name] = Member(name, found.size, found.offset) if found else Member(name, 0)
        return _ordered(members.values()), directories

    def read_any(self, member: Member) -> bytes:
        """Return the member's content."""
        if member.offset < 0:
            raise ValueError("a link to what is not in the archive")
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_RDONLY)
        content = os.pread(self._descriptor, member.size, member.offset)
        if len(content) != member.size:
            raise ValueError("the archive ends before it")
        return content


class ZipFiles(Files):
    """A zip archive."""

    _archive: zipfile.ZipFile | None = None

    def listing(self) -> tuple[list[Member], set[str]]:
        """Return all files and directories. Raises UserError when it is damaged."""
        members, directories = {}, set()
        for info in self._opened().infolist():
            if info.is_dir():
                directories.add(posixpath.normpath(info.filename))
            else:
                members[info.filename] = Member(info.filename, info.file_size)
        return _ordered(members.values()), directories

    def read_any(self, member: Member) -> bytes:
        """Return the member's content, decompressed and checked."""
        try:
            return self._opened().read(member.name)
        except (zipfile.BadZipFile, RuntimeError, NotImplementedError, zlib.error, EOFError, lzma.LZMAError) as error:
            raise ValueError(str(error) or type(error).__name__) from error

    def _opened(self) -> zipfile.ZipFile:
        if self._archive is None:
            try:
                self._archive = zipfile.ZipFile(self.path)
            except (zipfile.BadZipFile, ValueError, EOFError) as error:
                raise UserError(f"{self.shown} is not a whole zip archive ({error}); get it again") from None
        return self._archive


def open_files(argument: str, scratch: Path) -> Files:
    """Open a directory or an archive, told apart by content; a compressed tar is decompressed once into `scratch`.

    Raises UserError when the path is missing, of no known kind, or damaged.
    """
    path = Path(argument)
    if not path.exists():
        raise UserError(f"{path} does not exist; check the path")
    if path.is_dir():
        return DirectoryFiles(path.absolute(), path)
    try:
        with path.open("rb") as stream:
            head = stream.read(512)
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); check its permissions") from None
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return ZipFiles(path.absolute(), path)
    for magic, opener in _COMPRESSED.items():
        if head.startswith(magic):
            return TarFiles(_decompress(path, opener, scratch), path)
    if not head:
        raise UserError(f"{path} is empty; get it again")
    return TarFiles(path.absolute(), path)


def base_name(argument: str) -> str:
    """Return a path's last name without the suffix of an archive."""
    path = Path(argument).resolve()
    if path.is_dir():
        return path.name or "folder"
    suffix = next((suffix for suffix in _SUFFIXES if path.name.lower().endswith(suffix)), "")
    return path.name[: len(path.name) - len(suffix)] or "folder"


def _decompress(path: Path, opener: Any, scratch: Path) -> Path:
    target = (scratch / "source.tar").absolute()
    try:
        with opener(path, "rb") as source, target.open("wb") as out:
            shutil.copyfileobj(source, out, 2**20)
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is damaged ({error}); get it again") from None
    except OSError as error:
        if error.errno is not None:
            raise
        raise UserError(f"{path} is damaged ({error}); get it again") from None
    return target


def _ordered(members: Iterable[Member]) -> list[Member]:
    return sorted(members, key=lambda member: member.name)


def _fail(error: OSError) -> None:
    raise UserError(f"cannot read {error.filename} ({error.strerror}); check its permissions")
