"""Data sets that were built before are the same today: bytes, fingerprints, manifests."""

import json
import struct
import zlib

import numpy as np
from test_sharding_support import contents

from sharding.files import sha256_file
from sharding.manifest import Manifest
from sharding.options import Options
from sharding.writer import build

OLD = {"folder": "a76399b3a1d960b6", "splits": "bea1e0e1faf41a1c", "train/000000.tar": "7684e918f7c7ef1b"}
"""What commit e9ace49 gave for the same pictures. Their bytes are kept, so no library's version shapes them."""


def png(image: np.ndarray) -> bytes:
    """A PNG whose bytes no compressor chose."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + row.tobytes() for row in image)
    stored = (
        b"\x78\x01\x01"
        + struct.pack("<HH", len(rows), len(rows) ^ 0xFFFF)
        + rows
        + struct.pack(">I", zlib.adler32(rows))
    )
    head = struct.pack(">IIBBBBB", image.shape[1], image.shape[0], 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", stored) + chunk(b"IEND", b"")


def write(root, counts):
    for number, (folder, count) in enumerate(counts.items()):
        (root / folder).mkdir(parents=True)
        for i in range(count):
            image = (np.arange(48).reshape(4, 4, 3) * (number + 1) + 7 * i).astype(np.uint8)
            (root / folder / f"{i}.png").write_bytes(png(image))
    return root


def test_builds_of_clean_sources_are_the_same_as_before(tmp_path):
    plain = write(tmp_path / "plain", {"a": 12, "b b": 12, "ü": 9})
    manifest = build(f"folder:{plain}", tmp_path / "d", Options(workers=1, test_fraction=0.2)).manifest
    assert manifest.fingerprint == OLD["folder"]
    assert sha256_file(tmp_path / "d/train/000000.tar")[:16] == OLD["train/000000.tar"]
    splits = write(tmp_path / "splits", {"train/a": 9, "train/b": 9, "val/a": 2, "val/b": 2, "test/a": 2, "test/b": 3})
    assert build(f"folder:{splits}", tmp_path / "e", Options(workers=1)).manifest.fingerprint == OLD["splits"]


def test_a_manifest_keeps_its_fingerprint_with_and_without_what_was_left_out(tmp_path):
    plain = write(tmp_path / "plain", {"a": 12, "b": 12})
    manifest = build(f"folder:{plain}", tmp_path / "d", Options(workers=1, test_fraction=0.2)).manifest
    document = json.loads((tmp_path / "d/manifest.json").read_text())
    assert set(document) == {"format", "name", "classes", "image", "mean", "std", "versions", "splits"}
    assert list(document["splits"]["train"]["shards"][0]) == ["file", "samples", "bytes", "sha256", "index_sha256"]
    (tmp_path / "d/manifest.json").write_text(json.dumps(document | {"left_out": {".txt files": 3}}))
    again = Manifest.load(tmp_path / "d")
    assert again.left_out == {".txt files": 3}
    assert again.fingerprint == manifest.fingerprint
    before = contents(tmp_path / "d")
    (plain / "notes.txt").write_text("x")
    assert build(f"folder:{plain}", tmp_path / "d", Options(workers=1, test_fraction=0.2)).reused
    assert contents(tmp_path / "d") == before
