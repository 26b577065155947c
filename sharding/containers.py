"""Directories, tars and zips, recognized by their content and read in place through one interface."""

import importlib
import os
import posixpath
import shutil
import stat
import zipfile
from abc import ABC, abstractmethod
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from sharding.errors import UserError
from sharding.kinds import compression, system_files, unread
from sharding.links import LOST, SPECIAL, Member, check_walk, followed
from sharding.listing import UNPACKED
from sharding.tars import BLOCK, LONGEST_NAME, Unfit, checked_name, is_tar, read_at, shown, tree, writable

# A larger encoded image is treated as damaged, or as an attempt to exhaust the memory.
LARGEST_FILE = 256 * 2**20
_ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
_UNIX = (3, 19)
_UTF8, _ENCRYPTED, _UNICODE_NAME = 0x800, 1, b"up"
# Encodings of Windows in Japan, China and Taiwan, where the byte of a backslash may be the second half of a character.
_EAST_ASIA = ("cp932", "gbk", "cp950")
_OPENERS = {"gzip": ["gzip"], "bzip2": ["bz2"], "xz": ["lzma"]}
_OPENERS |= {"zstd": ["compression.zstd", "backports.zstd", "zstandard"]}
"""Compression program → modules that open its files; the first one installed is used."""
_SUFFIXES = (".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tgz", ".tbz2", ".txz", ".tar", ".zip")
_READ = "give a directory, a .tar (.gz, .bz2, .xz), or a .zip"


class Files(ABC):
    """A directory or an archive. An object can be sent to another process, which opens the files for itself."""

    def __init__(self, path: Path, shown: Path) -> None:
        """`shown` is the path that messages show."""
        self.path, self.shown = path, shown

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "shown": self.shown}

    @abstractmethod
    def listing(self) -> tuple[list[Member], set[str]]:
        """Return all files, sorted by name, and the names of directories, which need not be complete."""

    @abstractmethod
    def bytes_of(self, member: Member, most: int = -1) -> bytes:
        """Return a file's content, or its first `most` bytes. Raises OSError or ValueError with the reason."""

    def start_of(self, member: Member, most: int) -> bytes:
        """Return a file's first `most` bytes, or all if it is shorter; none if it cannot be read."""
        with suppress(OSError, ValueError):
            return self.bytes_of(member, most)
        return b""

    def read(self, member: Member) -> bytes:
        """Return a file's content of at most LARGEST_FILE bytes. Raises OSError or ValueError with the reason."""
        if member.odd:
            raise ValueError(f"one of the {member.odd}")
        if member.size > LARGEST_FILE:
            raise ValueError(f"larger than {LARGEST_FILE >> 20} MiB")
        return self.bytes_of(member)


class DirectoryFiles(Files):
    """A directory. Symbolic links are followed."""

    def listing(self) -> tuple[list[Member], set[str]]:
        """Return all files and all directories below the directory."""
        members: list[Member] = []
        directories: set[str] = set()
        entered: set[str] = set()
        closed = partial(_closed, self.path, members)
        for walked, (folder, names, files) in enumerate(os.walk(self.path, followlinks=True, onerror=closed)):
            entered.add(os.path.realpath(folder))
            check_walk(walked, len(entered))
            relative = os.path.relpath(folder, self.path)
            prefix = "" if relative == "." else relative.replace(os.sep, "/") + "/"
            for name in [name for name in names if _leads_back(os.path.join(folder, name))]:
                names.remove(name)  # walking it would never end
                members.append(Member(prefix + name, 0, odd=LOST))
            directories.update(prefix + name for name in names)
            members += [_look(os.path.join(folder, name), prefix + name) for name in files]
        return sorted(members, key=lambda member: member.name), directories

    def bytes_of(self, member: Member, most: int = -1) -> bytes:
        """Return the file's content, or its first bytes."""
        with (self.path / member.name).open("rb") as stream:
            return stream.read(most)


class TarFiles(Files):
    """An uncompressed tar. Its members are read at their offsets, by any number of processes at once."""

    _descriptor: int | None = None

    def listing(self) -> tuple[list[Member], set[str]]:
        """Return all files and directories. Raises UserError when it is truncated, damaged or of an unsupported kind."""
        try:
            members = [replace(member, name=posixpath.normpath(member.name)) for member in tree(self.path)]
        except Unfit as error:
            raise UserError(f"{self.shown} cannot be read as it is: {error}") from None
        except (ValueError, OSError) as error:
            raise UserError(f"{self.shown} is not a complete tar archive ({error}); download it again") from None
        return followed(members)

    def bytes_of(self, member: Member, most: int = -1) -> bytes:
        """Return the member's content, or its first bytes."""
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_RDONLY)
        return read_at(self._descriptor, member.size if most < 0 else min(most, member.size), member.offset)


class ZipFiles(Files):
    """A zip archive."""

    _archive: zipfile.ZipFile | None = None

    def listing(self) -> tuple[list[Member], set[str]]:
        """Return all files and directories. Raises UserError when it is damaged, or of a kind that is not read."""
        members: list[Member] = []
        infos = self._opened().infolist()
        written = [_zip_name(info) for info in infos]
        windows = not any("/" in name for name, _ in written)
        for place, (info, (name, unknown)) in enumerate(zip(infos, written, strict=True)):
            half = _may_be_half(unknown)
            if (windows or info.create_system == 0) and not half:  # some programs on Windows write backslashes
                name = name.replace("\\", "/")
            self._check(info, name, half=windows and half)
            kind = stat.S_IFMT(info.external_attr >> 16) if info.create_system in _UNIX else 0
            folder, name = name.endswith("/") or kind == stat.S_IFDIR, posixpath.normpath(name)
            odd = "" if kind in (0, stat.S_IFREG, stat.S_IFLNK) else SPECIAL
            member = Member(name, info.file_size, place, odd)
            if kind == stat.S_IFLNK:
                way = os.fsdecode(self.start_of(member, LONGEST_NAME))
                member = replace(member, target=posixpath.join(posixpath.dirname(name), way) or ".")
            members.append(Member(name) if folder and not member.target else member)
        return followed(members)

    def bytes_of(self, member: Member, most: int = -1) -> bytes:
        """Return the member's content, decompressed and checked, or its first bytes."""
        archive = self._opened()
        try:
            with archive.open(archive.infolist()[member.offset]) as stream:
                return stream.read(most)
        except Exception as error:  # zipfile raises many types for damaged files
            raise ValueError(str(error) or type(error).__name__) from error

    def _check(self, info: zipfile.ZipInfo, name: str, *, half: bool) -> None:
        try:
            checked_name(name)
            if half:
                raise ValueError(f"a backslash in {shown(name)} separates names or is the half of a character")
            if info.flag_bits & _ENCRYPTED:
                raise ValueError(f"{shown(name)} is encrypted")
            if info.compress_type not in _ZIP_METHODS:
                raise ValueError(f"{shown(name)} is compressed by method {info.compress_type}, which is not supported")
        except ValueError as error:
            what = f"{self.shown} cannot be read as it is: {error}"
            raise UserError(f"{what}; unpack it and give the directory") from None

    def _opened(self) -> zipfile.ZipFile:
        if self._archive is None:
            try:
                self._archive = zipfile.ZipFile(self.path)
            except OSError:
                raise
            except Exception as error:  # zipfile raises many types for damaged files
                raise UserError(f"{self.shown} is not a complete zip archive ({error}); download it again") from None
        return self._archive


def _zip_name(info: zipfile.ZipInfo) -> tuple[str, bytes]:
    """Return a member's name, and its bytes if their encoding is unknown, else none.

    The name is UTF-8 if it is marked or valid as such; other names from unix are as a directory gives them.
    """
    if info.flag_bits & _UTF8:
        return info.orig_filename, b""
    extra = info.extra
    while len(extra) > 4:  # Info-ZIP stores the real name here if the header has a substitute
        size = int.from_bytes(extra[2:4], "little")
        if extra[:2] == _UNICODE_NAME:
            return extra[9 : 4 + size].decode("utf-8", "surrogateescape"), b""
        extra = extra[4 + size :]
    name = info.orig_filename.encode("cp437")
    with suppress(UnicodeDecodeError):
        return name.decode("utf-8"), b""
    return info.orig_filename if info.create_system == 0 else os.fsdecode(name), name


def _may_be_half(name: bytes) -> bool:
    """Whether a backslash of a name may be the second byte of a character, as it is in 83 5C, the Japanese so."""
    for encoding in _EAST_ASIA:
        with suppress(UnicodeDecodeError):
            if name.decode(encoding).count("\\") < name.count(b"\\"):
                return True
    return False


def _look(path: str, name: str) -> Member:
    """Describe the directory entry at `path` as a member called `name`; links are followed."""
    try:
        found = os.stat(path)
    except PermissionError:
        return Member(name, 0)  # the error is reported when the file is read
    except OSError:
        return Member(name, 0, odd=LOST)
    return Member(name, found.st_size, odd="" if stat.S_ISREG(found.st_mode) else SPECIAL)


def _leads_back(path: str) -> bool:
    """Whether a directory is a link to one above it."""
    return os.path.islink(path) and os.path.realpath(path) in map(os.path.realpath, Path(path).parents)


def _closed(root: Path, members: list[Member], error: OSError) -> None:
    """Count a directory that cannot be read as one file if it would be left out anyway. Raises UserError for others."""
    name = os.path.relpath(error.filename, root)
    if name == "." or not system_files(name):
        raise UserError(f"cannot read {error.filename} ({error.strerror}); check its permissions")
    members.append(Member(name, 0))


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
