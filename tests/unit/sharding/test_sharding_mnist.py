"""MNIST's and Fashion-MNIST's published files, made small here."""

import gzip

import numpy as np
import pytest
from test_sharding_left_out import stored
from test_sharding_support import to_tar, to_zip

from sharding.errors import UserError
from sharding.options import Options
from sharding.writer import build

ONE = Options(workers=1, val_fraction=0.2)
IMAGES = {"train": 60, "t10k": 20}


def pixels(prefix: str) -> np.ndarray:
    return np.random.default_rng(len(prefix)).integers(0, 256, (IMAGES[prefix], 6, 5), np.uint8)


def write(folder, *, packed: bool = False, dotted: bool = False):
    folder.mkdir(parents=True)
    for prefix, count in IMAGES.items():
        shape = np.array([count, 6, 5], ">u4").tobytes()
        labels = (np.arange(count) % 10).astype(np.uint8)
        for kind, content in (
            ("images-idx3", b"\0\0\x08\x03" + shape + pixels(prefix).tobytes()),
            ("labels-idx1", b"\0\0\x08\x01" + shape[:4] + labels.tobytes()),
        ):
            name = f"{prefix}-{kind.replace('-', '.') if dotted else kind}-ubyte"
            (folder / (name + ".gz" * packed)).write_bytes(gzip.compress(content) if packed else content)
    return folder


EXPECTED = sorted((image.tobytes(), i % 10) for prefix in IMAGES for i, image in enumerate(pixels(prefix)))


@pytest.mark.parametrize(("packed", "dotted"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("pack", [None, to_tar, to_zip])
def test_the_published_files_are_read_from_directories_and_archives(tmp_path, packed, dotted, pack):
    path = write(tmp_path / "raw", packed=packed, dotted=dotted)
    (path / "readme.txt").write_text("x")
    path = pack(path, tmp_path / "x.archive") if pack else path
    lines: list[str] = []
    manifest = build(f"mnist:{path}", tmp_path / "d", ONE, log=lines.append).manifest
    assert (manifest.name, manifest.classes) == ("mnist", tuple("0123456789"))
    assert (manifest.height, manifest.width, manifest.channels) == (6, 5, 1)
    assert {name: split.samples for name, split in manifest.splits.items()} == {"train": 48, "val": 12, "test": 20}
    assert manifest.splits["test"].class_counts == (2,) * 10
    assert manifest.left_out == {".txt files": 1}
    assert stored(tmp_path / "d") == EXPECTED
    assert any("class names are those of MNIST" in line for line in lines)


def test_fashion_is_told_by_the_path(tmp_path):
    lines: list[str] = []
    manifest = build(f"mnist:{write(tmp_path / 'Fashion')}", tmp_path / "d", ONE, log=lines.append).manifest
    assert (manifest.name, manifest.classes[9]) == ("mnist", "Ankle boot")
    assert any(
        "class names are those of Fashion-MNIST, because PATH contains the word fashion" in line for line in lines
    )
    first = Options(workers=1, val_fraction=0.2, classes=("2",))
    assert build(f"mnist:{tmp_path / 'Fashion'}", tmp_path / "two", first).manifest.classes == (
        "T-shirt/top",
        "Trouser",
    )


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("train-images-idx3-ubyte", None, "holds no train-images-idx3-ubyte or train-images-idx3-ubyte.gz"),
        ("train-images-idx3-ubyte", lambda data: data[:-1], "is malformed"),
        ("train-images-idx3-ubyte", lambda data: data[:3], "is malformed"),
        ("t10k-labels-idx1-ubyte", lambda data: b"\0\0\x0d\x01" + data[4:], "it is not an idx file of bytes"),
        (
            "t10k-labels-idx1-ubyte",
            lambda data: data[:-1] + b"\x0a",
            "the t10k labels in .* are 0 … 10, not 0 … 9; write",
        ),
        (
            "train-labels-idx1-ubyte",
            lambda data: data[:8] + bytes(1 + i % 26 for i in range(60)),
            "the train labels in .* are 1 … 26, not 0 … 9; write such a set as files",
        ),
        (
            "train-labels-idx1-ubyte",
            lambda data: data[:4] + b"\0\0\0\x01\0",
            "the train files in .* do not match each other",
        ),
        ("train-labels-idx1-ubyte", lambda data: gzip.compress(data)[:-9], "is malformed"),
    ],
)
def test_files_that_are_missing_or_malformed_are_named(tmp_path, name, change, message):
    folder = write(tmp_path / "raw")
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    if change:
        (folder / name).write_bytes(change(content))
    with pytest.raises(UserError, match=message):
        build(f"mnist:{folder}", tmp_path / "d", ONE)
