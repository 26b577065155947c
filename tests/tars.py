"""WebDataset tars as others make them, and hostile ones. Holds no test."""

from __future__ import annotations

import io
import json
import os
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from sharding.errors import UserError
from sharding.options import Options
from sharding.writer import build


def image(seed: int, kind: str = "JPEG", size: int = 8, mode: str = "RGB") -> bytes:
    """An encoded image of coarse noise."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (size, size) if mode == "L" else (size, size, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return stream.getvalue()


def tar(path: Path, files: dict[str, bytes], format: int = tarfile.USTAR_FORMAT) -> Path:
    """A whole tar of plain files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def samples(first: int, count: int, classes: int = 3, prefix: str = "") -> dict[str, bytes]:
    """Files of samples KEY.jpg + KEY.cls."""
    files = {}
    for i in range(first, first + count):
        files[f"{prefix}{i:05d}.jpg"] = image(i)
        files[f"{prefix}{i:05d}.cls"] = str(i % classes).encode()
    return files


def header(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, link: str = "") -> bytes:
    """A member's header alone."""
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = size, kind, link
    return info.tobuf(tarfile.GNU_FORMAT)


def png_bomb(side: int) -> bytes:
    """A PNG of side × side black pixels, a few kilobytes long."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    packer = zlib.compressobj(9)
    data = packer.compress(bytes(2**24)) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def jpeg_bomb(side: int = 65500) -> bytes:
    """A JPEG whose header claims side × side pixels."""
    data = bytearray(image(0))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", side, side)
    return bytes(data)


def _with(extra: dict[str, bytes], without: str = "") -> Callable[[Path], None]:
    def make(path: Path) -> None:
        files = {name: content for name, content in samples(0, 12).items() if name != without}
        tar(path, dict(sorted((files | extra).items())))

    return make


def _raw(block: bytes) -> Callable[[Path], None]:
    """The block in front of a whole archive."""

    def make(path: Path) -> None:
        tar(path, samples(0, 12))
        path.write_bytes(block + path.read_bytes())

    return make


def _cut(by: int) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        tar(path, samples(0, 12))
        path.write_bytes(path.read_bytes()[:-by])

    return make


def _changed(change: Callable[[bytearray], None]) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        tar(path, samples(0, 12))
        data = bytearray(path.read_bytes())
        change(data)
        path.write_bytes(data)

    return make


def _no_header(data: bytearray) -> None:
    at = data.index(b"00003.cls")
    data[at : at + 6] = b"broken"


def _without_end(data: bytearray) -> None:
    """Cut where the last member ends: `tarfile` takes such an archive for whole."""
    del data[-(-len(data.rstrip(b"\0")) // 512) * 512 :]


def _pickled(path: Path) -> None:
    evil = b"cos\nsystem\n(S'touch /tmp/gdd-was-unpickled'\ntR."
    tar(path, samples(0, 12) | {f"00003.{ext}": evil for ext in ("pyd", "pickle", "pth")})


def _twice(path: Path) -> None:
    tar(path, samples(0, 12))
    with tarfile.open(path, "a") as archive:
        info = tarfile.TarInfo("00003.jpg")
        info.size = 4
        archive.addfile(info, io.BytesIO(b"abcd"))


def _sparse_pax(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo("a.jpg")
        info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.name": "a.jpg", "GNU.sparse.realsize": "1000000000000"}
        archive.addfile(info)


def _long_name(path: Path) -> None:
    """A GNU long name that claims 2^40 bytes."""
    _raw(header("././@LongLink", 2**40, tarfile.GNUTYPE_LONGNAME))(path)


DEEP = b"[" * 500_000
HOSTILE: dict[str, tuple[Callable[[Path], None], str]] = {
    "absolute name": (_with({"/etc/a.jpg": b"x"}), r"/etc/a\.jpg is an absolute name"),
    "leads outside": (_with({"x/../../a.jpg": b"x"}), r"x/\.\./\.\./a\.jpg leads outside"),
    "symbolic link": (_raw(header("a.jpg", 0, tarfile.SYMTYPE, "/etc/passwd")), r"a\.jpg is a link"),
    "hard link": (_raw(header("a.jpg", 0, tarfile.LNKTYPE, "b.jpg")), r"a\.jpg is a link"),
    "device": (_raw(header("a.jpg", 0, tarfile.CHRTYPE)), r"a\.jpg is a device"),
    "fifo": (_raw(header("a.jpg", 0, tarfile.FIFOTYPE)), r"a\.jpg is a device"),
    "sparse": (_raw(header("a.jpg", 0, tarfile.GNUTYPE_SPARSE)), r"a\.jpg is a sparse file"),
    "sparse by pax": (_sparse_pax, "is a sparse file"),
    "unknown kind": (_raw(header("a.jpg", 0, b"Q")), r"a\.jpg is a member of unknown kind"),
    "claims 2^60 bytes": (_raw(header("a.jpg", 2**60)), r"a\.jpg claims 1152921504606846976 bytes, but"),
    "long name of 2^40 bytes": (_long_name, "extended header at byte 0 claims 1099511627776 bytes"),
    "cut in its end": (_cut(10240 - 1024 + 512), "is truncated"),
    "cut between members": (_changed(_without_end), "before its two closing zero blocks: it is truncated"),
    "cut inside a member": (_cut(12000), "truncated or forged"),
    "no header": (_changed(_no_header), r"the block at byte \d+ is not a header"),
    "bytes after its end": (_changed(lambda data: data.extend(b"more")), "bytes after its end"),
    "JPEG bomb": (_with({"00003.jpg": jpeg_bomb()}), r"00003\.jpg"),
    "PNG bomb": (_with({"00003.png": png_bomb(65500)}, without="00003.jpg"), r"00003\.png"),
    "key twice": (_twice, "key 00003 occurs twice"),
    "two images": (_with({"00011.png": b"x"}), "key 00011 has 2 images"),
    "no image": (_with({}, without="00003.jpg"), r"key 00003 has no image"),
    "empty image": (_with({"00003.jpg": b""}), "key 00003 has an empty image"),
    "no label": (_with({}, without="00003.cls"), r"key 00003 has no label"),
    "no class": (_with({"00003.cls": b"cat"}), "key 00003 has the label cat, which is not a class"),
    "negative class": (_with({"00003.cls": b"-1"}), "key 00003 has the label -1"),
    "huge class": (_with({"00003.cls": b"999999999"}), r"00003\.jpg has the label 999999999, but train has fewer"),
    "label of a megabyte": (_with({"00003.cls": b"1" * 10**6}), r"key 00003 has a \.cls of 1000000 bytes"),
    "deep json": (
        _with({"00003.json": DEEP}, without="00003.cls"),
        r"key 00003 has a \.json file that is not valid JSON",
    ),
}


def build_it(path: Path, dest: Path) -> str:
    """Build a data set of one tar; returns what the user is told, "" if it was built."""
    options = Options(val_fraction=0.2, test_fraction=0.2, workers=1)
    try:
        build(f"webdataset:{path}", dest, options)
    except UserError as error:
        return str(error)
    return ""


def measured(make: Callable[[Path], None], folder: Path) -> tuple[str, float]:
    """What `build_it` says of a hostile tar, and by how many MB that raised the peak of the process that ran it."""
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        path = folder / "hostile.tar"
        make(path)
        Path("/proc/self/clear_refs").write_text("5")
        before = _peak()
        said = build_it(path, folder / "dest")
        os.write(write, json.dumps([said, (_peak() - before) / 1000]).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as stream:
        answer = stream.read()
    _, status = os.waitpid(child, 0)
    assert status == 0, f"the process ended with {status}"
    said, megabytes = json.loads(answer)
    return said, megabytes


def _peak() -> int:
    """Highest resident memory since it was last reset, in kB."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def labelled(path: Path, document: object) -> Path:
    """One sample whose label is in a .json."""
    return tar(path, {"a.jpg": image(0), "a.json": json.dumps(document).encode()})
