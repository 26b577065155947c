"""The kind of a file, recognized by its first bytes or its name, and advice about kinds that cannot be read."""

import re

HEAD = 64
"""Number of first bytes that are enough to recognize a file."""
_IMAGE = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|RIFF....WEBP|II\*\0|MM\0\*|\0\0\0\x0cjP  |....ftypavi[fs]", re.DOTALL
)
_UNPACK = "unpack it ({} {{file}}) and give the directory"
_REWRITE = "write its images as files, DIRECTORY/CLASS/IMAGE, or as WebDataset tars"
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz"}
_COMPRESSED |= {b"\x28\xb5\x2f\xfd": "zstd", b"\x04\x22\x4d\x18": "lz4", b"LZIP": "lzip"}
_PAGE = ("a web page, not an archive", "open it in a browser: the download may need a login")
_OTHERS = {
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", _UNPACK.format("7z x")),
    b"Rar!\x1a\x07": ("a RAR archive", _UNPACK.format("unrar x")),
    b"hsqs": ("a squashfs image", _UNPACK.format("unsquashfs")),
    b"07070": ("a cpio archive", _UNPACK.format("cpio -id <")),
    b"PK": ("a zip archive", "give it as folder:PATH, or unpack it"),
    b"PAR1": ("a Parquet file", _REWRITE),
    b"ARROW1": ("an Arrow file", _REWRITE),
    b"\x89HDF\r\n\x1a\n": ("an HDF5 file", _REWRITE),
    b"\x93NUMPY": ("a NumPy array", _REWRITE),
    b"SQLite format 3\0": ("an SQLite database", _REWRITE),
    b"%PDF": ("a PDF document", _REWRITE),
    b"version https://git-lfs": ("a pointer of Git LFS, not the file itself", "fetch the file: git lfs pull"),
    b"<!doctype html": _PAGE,
    b"<html": _PAGE,
}
_SYSTEM = frozenset(
    ("__macosx", "@eadir", "@tmp", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "$recycle.bin")
    + ("system volume information", "lost+found", "__pycache__")
)
HIDDEN = "hidden files"


def is_image(head: bytes) -> bool:
    """Whether a file that begins with `head` is an image of a supported format; HEAD bytes are enough."""
    return _IMAGE.match(head) is not None


def compression(head: bytes) -> str | None:
    """Return the program that decompresses a file beginning with `head`; None if it is not compressed."""
    return next((program for magic, program in _COMPRESSED.items() if head.startswith(magic)), None)


def unread(head: bytes, file: str) -> str | None:
    """Return what a file beginning with `head` is, and what to do about it, as ``what; cure``; None if unknown."""
    if program := compression(head):
        return f"compressed ({program}); decompress it first: {program} -dc {file} > NEW.tar"
    if is_image(head):
        return "a single image; give the directory that holds the directories of the classes"
    for magic, (what, cure) in _OTHERS.items():
        if head.lower().startswith(magic.lower()):
            return f"{what}; {cure.format(file=file)}"
    return None


def system_files(name: str) -> str:
    """Return why a file or directory is ignored (hidden, or an operating system's); "" if it is not ignored."""
    for part in name.split("/"):
        if part.startswith(".") and part not in (".", ".."):
            return HIDDEN
        if part.casefold() in _SYSTEM:
            return f"files in {part}"
    return ""
