"""The members of a tar archive, read from its headers, none of which is trusted.

`tarfile` stops silently at a truncation or a bad header. This module raises an error unless the archive is complete, up to
its two closing zero blocks. Members are plain files, directories and, if requested, links and special files, with names
inside the archive; any other member is an error. No header makes this module allocate more than a mebibyte.
"""

import os
import posixpath
import re
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from sharding.links import SPECIAL, Member

BLOCK = tarfile.BLOCKSIZE
LONGEST_NAME = 4096
LARGEST_EXTENSION = 2**20
_ZEROS = bytes(BLOCK)
_PLAIN = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_LINKS = (tarfile.LNKTYPE, tarfile.SYMTYPE)
_DEVICES = (tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)
_LABEL, _DUMP, _VOLUME = b"V", b"D", b"M"  # GNU's: a label, a directory with its names, the rest of a split file
_LONG = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE)
_SPARSE = "is a sparse file; write the archive again without --sparse"
_RECORD = re.compile(rb"(\d{1,7}) ([^=\n]{1,256})=")


def entries(path: Path) -> Iterator[Member]:
    """Yield the plain files of an uncompressed tar, in order, with their names as in the archive.

    Raises ValueError, with the member's name if it has one, for an archive that is truncated or damaged, or holds links,
    devices, sparse files or names that lead outside. Raises OSError when it cannot be read.
    """
    for member in tree(path):
        if member.target or member.odd:
            raise ValueError(f"{shown(member.name)} is {'a link' if member.target else 'a device'}")
        if member.offset >= 0:
            yield member


def tree(path: Path) -> Iterator[Member]:
    """Yield what `entries` yields, and also directories, links, pipes and devices.

    Raises Unfit, a ValueError, for an archive that is complete but of an unsupported kind.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield from _Walk(descriptor, os.fstat(descriptor).st_size).members()
    finally:
        os.close(descriptor)


def is_tar(head: bytes) -> bool:
    """Whether a file's first block is the header of a tar, or the end of an empty tar."""
    with suppress(tarfile.HeaderError, ValueError, OverflowError):
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
        return True
    return head == bytes(BLOCK)


def shown(name: str) -> str:
    """Return a member's name for printing: short, on one line, without control characters."""
    return _escaped(writable(name if len(name) <= 200 else f"{name[:200]}…"))


def shown_whole(name: str) -> str:
    """Return a member's whole name for printing, on one line; only its parts with control characters are escaped."""
    return "/".join(map(_escaped, writable(name).split("/")))


def _escaped(text: str) -> str:
    return text if text.isprintable() else ascii(text)[1:-1]


def writable(name: str) -> str:
    """Return a name that can be written as text: bytes that are not UTF-8 become ``\\xe9``."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


class Unfit(ValueError):
    """The archive is complete, but of an unsupported kind; the message says what to do."""


class _Walk:
    """One pass over the headers."""

    def __init__(self, descriptor: int, end: int) -> None:
        self._descriptor, self._end = descriptor, end

    def members(self) -> Iterator[Member]:
        position, extensions = 0, dict[str, str]()
        while (block := self._bytes(position, BLOCK, "its two closing zero blocks")) != _ZEROS:
            info = self._header(block, position)
            data = position + BLOCK
            if info.type in _LONG or info.type in _PAX:
                extensions |= self._extension(info, data)
                position = data + padded(info.size)
                continue
            if info.type == _LABEL:  # the label of the whole volume, as `tar -V` writes it
                position, extensions = data, {}
                continue
            name = checked_name(extensions.get("path", info.name))
            size = _size(extensions["size"], name) if "size" in extensions else info.size
            target = _target(info, name, extensions.get("linkpath", info.linkname))
            extensions = {}
            if info.type not in _PLAIN:
                yield Member(name, target=target, odd=SPECIAL if info.type in _DEVICES else "")
                position = data + (padded(size) if info.type == _DUMP else 0)
                continue
            position = data + padded(size)
            if position > self._end:
                left = max(0, self._end - data)
                raise ValueError(f"{shown(name)} claims {size} bytes, but {left} are left: truncated or forged")
            yield Member(name, size, data)
        if extensions:
            raise ValueError("it ends after an extended header whose member is missing")
        self._check_end(position)

    def _bytes(self, position: int, size: int, what: str) -> bytes:
        found = os.pread(self._descriptor, size, position)
        if len(found) < size:
            raise ValueError(f"it ends at byte {self._end}, before {what}: it is truncated")
        return found

    def _header(self, block: bytes, position: int) -> tarfile.TarInfo:
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        # tarfile raises exceptions of several types for a block that is not a header.
        except (tarfile.HeaderError, ValueError, OverflowError) as error:
            raise ValueError(f"the block at byte {position} is not a header ({error})") from None
        if info.size < 0:
            raise ValueError(f"{shown(info.name)} claims a size of {info.size} bytes")
        return info

    def _extension(self, info: tarfile.TarInfo, data: int) -> dict[str, str]:
        """Return what an extended header says about the next member: its ``path``, ``linkpath`` and ``size``."""
        if info.size > LARGEST_EXTENSION:
            raise ValueError(f"the extended header at byte {data - BLOCK} claims {info.size} bytes")
        content = self._bytes(data, info.size, "the end of an extended header")
        if info.type in _LONG:
            name = content.partition(b"\0")[0].decode("utf-8", "surrogateescape")
            return {"path" if info.type == tarfile.GNUTYPE_LONGNAME else "linkpath": name}
        found = dict(_records(content))
        if any(key.startswith("GNU.sparse") for key in found):
            name = found.get("GNU.sparse.name", found.get("path", info.name))
            raise Unfit(f"{shown(name)} {_SPARSE}")
        found = {key: found[key] for key in ("path", "linkpath", "size") if key in found}
        if found and info.type == tarfile.XGLTYPE:
            raise ValueError(f"a global header sets the {' and '.join(found)} of all members")
        return found

    def _check_end(self, position: int) -> None:
        if self._bytes(position + BLOCK, BLOCK, "the second of its two closing zero blocks") != _ZEROS:
            raise ValueError(f"the block at byte {position + BLOCK} follows a zero block but is not zero")
        position += 2 * BLOCK
        while chunk := os.pread(self._descriptor, 2**20, position):
            if rest := chunk.lstrip(b"\0"):
                start = position + (len(chunk) - len(rest)) // BLOCK * BLOCK
                if is_tar(os.pread(self._descriptor, BLOCK, start)):
                    what = f"a second archive begins at byte {start}"
                    raise Unfit(f"{what}; unpack it (tar -xif) and give the directory")
                raise ValueError(f"there are bytes after its end, from byte {position} on")
            position += len(chunk)


def read_at(descriptor: int, size: int, offset: int) -> bytes:
    """Return `size` bytes of an open file from `offset` on. Raises ValueError if the file ends earlier."""
    content = os.pread(descriptor, size, offset)
    if len(content) != size:
        raise ValueError("the archive ends before the end of this file")
    return content


def padded(size: int) -> int:
    """Return how many bytes a member of `size` bytes takes in the archive: whole blocks."""
    return -(-size // BLOCK) * BLOCK


def checked_name(name: str) -> str:
    """Return a member's name unchanged. Raises ValueError if it leads outside the archive, or is not a file name."""
    if not name or len(name) > LONGEST_NAME:
        raise ValueError(f"a member's name has {len(name)} characters")
    if name.startswith("/"):
        raise Unfit(f"{shown(name)} is an absolute name; write the archive again with relative ones (tar without -P)")
    if ".." in name.split("/"):
        raise Unfit(f"{shown(name)} leads outside the archive; write the archive again without it")
    if "\0" in name:
        raise ValueError(f"{shown(name)} is not a file name")
    return name


def _target(info: tarfile.TarInfo, name: str, linkname: str) -> str:
    """Return the target of a link, or "" for other members. Raises ValueError for members of unknown kinds."""
    if info.type in (*_PLAIN, *_DEVICES, tarfile.DIRTYPE, _DUMP):
        return ""
    if info.type in _LINKS:  # a hard link names a member; a symbolic link is relative to its directory
        return posixpath.join("" if info.islnk() else posixpath.dirname(name), linkname) or "."
    if info.type == tarfile.GNUTYPE_SPARSE:
        raise Unfit(f"{shown(name)} {_SPARSE}")
    if info.type == _VOLUME:
        raise Unfit(f"{shown(name)} began in another volume; unpack it (tar -xM) and give the directory")
    raise ValueError(f"{shown(name)} is a member of unknown kind {info.type!r}")


def _size(text: str, name: str) -> int:
    if not re.fullmatch(r"[0-9]{1,20}", text):
        raise ValueError(f"{shown(name)} claims a size of {shown(text)} bytes")
    return int(text)


def _records(content: bytes) -> Iterator[tuple[str, str]]:
    """The records ``LENGTH KEY=VALUE\\n`` of a pax header."""
    position = 0
    while position < len(content) and content[position]:
        match = _RECORD.match(content, position)
        end = position + int(match[1]) if match else 0
        if match is None or end <= match.end() or end > len(content) or content[end - 1] != 0x0A:
            raise ValueError("a pax header is damaged")
        key, value = match[2].decode("utf-8", "replace"), content[match.end() : end - 1]
        yield key, value.decode("utf-8", "surrogateescape")
        position = end
