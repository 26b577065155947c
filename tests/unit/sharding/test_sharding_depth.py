"""Images of more than 8 bits are not darkened, and no option is ignored, without a word."""

import io
import struct
import zlib
from functools import partial

import numpy as np
import pytest
from PIL import Image
from test_sharding_left_out import stored
from test_sharding_support import encoded, pixels, write_folder
from test_sharding_values import CUT, chunk

from sharding.depth import COLOUR, depth_of
from sharding.errors import UserError
from sharding.images import inspect
from sharding.options import Options
from sharding.writer import build

COLOUR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}


def png(array: np.ndarray) -> bytes:
    """A 16-bit PNG of uint16 [H, W, C]: grey, grey with alpha, RGB or RGBA."""
    height, width, channels = array.shape
    header = struct.pack(">IIBBBBB", width, height, 16, COLOUR_TYPES[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff(array: np.ndarray, photometric: int = 1, sample_format: int = 1) -> bytes:
    """An uncompressed TIFF of [H, W] or [H, W, C], little-endian."""
    height, width, channels = array.shape if array.ndim == 3 else (*array.shape, 1)
    array, bits = array.astype(array.dtype.newbyteorder("<")), array.dtype.itemsize * 8
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8, 277: channels, 278: height}
    tags |= {279: array.nbytes, 339: sample_format}
    data = array.tobytes()
    depths = 8 + len(data) + 2 + 12 * len(tags) + 4
    entries = struct.pack("<H", len(tags))
    for tag, value in tags.items():
        if tag == 258 and channels > 1:
            entries += struct.pack("<HHII", tag, 3, channels, depths)
        else:
            entries += struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + entries + bytes(4) + struct.pack("<H", bits) * channels


def ppm(array: np.ndarray) -> bytes:
    height, width, _ = array.shape
    return f"P6 {width} {height} 65535\n".encode() + array.astype(">u2").tobytes()


def deep(seed: int, high: int, channels: int) -> np.ndarray:
    """uint16 [8, 8, C] in 0 … high; a fourth or a second channel is opaque alpha."""
    array = np.random.default_rng(seed).integers(0, high, (8, 8, channels), np.uint16, endpoint=True)
    array[0, 0, 0] = high
    if channels in (2, 4):
        array[..., -1] = 65535
    return array


def made(root, encode, high: int, channels: int, suffix: str):
    for number, name in enumerate("ab"):
        (root / name).mkdir(parents=True)
        for i in range(6):
            (root / name / f"{i}.{suffix}").write_bytes(encode(deep(number * 10 + i, high, channels)))
    return root


KINDS = {
    "RGB": (png, 3, "png"),
    "RGBA": (png, 4, "png"),
    "LA": (png, 2, "png"),
    "TIFF": (partial(tiff, photometric=2), 3, "tif"),
}
KINDS["PPM"] = (ppm, 3, "ppm")


@pytest.mark.parametrize("kind", KINDS)
def test_dark_colours_of_16_bits_are_refused(kind, tmp_path):
    encode, channels, suffix = KINDS[kind]
    folder = made(tmp_path / "s", encode, 200, channels, suffix)
    for options in (CUT, Options(workers=1, test_fraction=0.2, value_range=(0, 200))):
        with pytest.raises(
            UserError, match="no pixel of 12 images of 16-bit colours is above .*; convert them to 8 bits"
        ):
            build(f"folder:{folder}", tmp_path / "d", options)


@pytest.mark.parametrize("high", [4095, 65535])
@pytest.mark.parametrize("kind", KINDS)
def test_colours_of_16_bits_that_use_a_part_of_them_are_told(kind, high, tmp_path):
    encode, channels, suffix = KINDS[kind]
    folder, lines = made(tmp_path / "s", encode, high, channels, suffix), list[str]()
    build(f"folder:{folder}", tmp_path / "d", CUT, log=lines.append)
    told = [line for line in lines if "convert them to 8 bits to spread them over all shades" in line]
    assert len(told) == (high == 4095)
    assert not any("--value-range" in line for line in lines)
    if kind != "PPM":  # Pillow rounds those
        first = np.repeat(deep(0, high, 2)[..., :1], 3, 2) if channels == 2 else deep(0, high, channels)[..., :3]
        assert ((first >> 8).astype(np.uint8).tobytes(), 0) in stored(tmp_path / "d")
    build(
        f"folder:{folder}", tmp_path / "e", Options(workers=1, test_fraction=0.2, value_range=(0, 9)), log=lines.append
    )
    assert "--value-range has no effect on 12 images of 16-bit colours" in lines
    assert stored(tmp_path / "e") == stored(tmp_path / "d")


def test_jpeg_2000_of_16_bits_is_known_by_its_codestream():
    image = pixels(0, 32, 32)
    assert inspect(encoded(image, "JPEG2000")).depth == ""
    payload = bytearray(encoded(image, "JPEG2000", no_jp2=True))
    payload[42] = 15  # the bits of the first channel, less one
    with Image.open(io.BytesIO(payload)) as opened:
        assert depth_of(opened, bytes(payload)) == COLOUR


def test_a_range_without_effect_is_said(tmp_path):
    folder, lines = write_folder(tmp_path / "s", {"a": 6, "b": 6}), list[str]()
    ranged = Options(workers=1, test_fraction=0.2, value_range=(0, 1))
    build(f"folder:{folder}", tmp_path / "d", ranged, log=lines.append)
    assert "--value-range has no effect, because no image has more than 8 bits" in lines
    (folder / "a/deep.png").write_bytes(png(deep(1, 4095, 1)))
    lines.clear()
    build(f"folder:{folder}", tmp_path / "e", ranged, log=lines.append)
    assert not any("no effect" in line for line in lines)


def written(tmp_path, array, options=CUT, **tags):
    """Build a set whose 12 TIFFs hold `array`; the pixels of its samples, all the same."""
    folder = tmp_path / "s"
    for name in "ab":
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(6):
            (folder / name / f"{i}.tif").write_bytes(tiff(np.roll(array, 0 if name == "a" else 1), **tags))
    build(f"folder:{folder}", tmp_path / "d", options)
    (content,) = {content for content, label in stored(tmp_path / "d") if label == 0}
    return np.frombuffer(content, np.uint8).reshape(array.shape)


SIGNED = {"int8": np.arange(-32, 32, dtype=np.int8), "int16": np.arange(-32, 32, dtype=np.int16) * 1000}
SIGNED |= {
    "int32": np.arange(-32, 32, dtype=np.int32) * 60_000_000,
    "uint32": np.arange(64, dtype=np.uint32) * 65_000_000,
}


@pytest.mark.parametrize("kind", SIGNED)
def test_signs_of_a_tiff_are_what_it_says(kind, tmp_path):
    array = SIGNED[kind].reshape(8, 8)
    tags, low, high = {"sample_format": 1 if kind == "uint32" else 2}, float(array.min()), float(array.max())
    with pytest.raises(UserError, match="no defined range") as refused:
        written(tmp_path, array, **tags)
    assert f"these lie between {low:g} and {high:g}" in str(refused.value)
    found = written(tmp_path, array, Options(workers=1, test_fraction=0.2, value_range=(low, high)), **tags)
    assert (found == np.floor((array.astype(float) - low) / (high - low) * 255 + 0.5)).all()


@pytest.mark.parametrize("values", [None, (0.0, 40000.0)])
def test_the_smallest_value_is_white_where_a_tiff_says_so(values, tmp_path):
    array = np.linspace(0, 40000, 64).astype(np.uint16).reshape(8, 8)
    options = Options(workers=1, test_fraction=0.2, value_range=values)
    found = written(tmp_path, array, options, photometric=0)
    whole = 40000 if values else 65535
    assert (found == 255 - np.floor(array / whole * 255 + 0.5)).all()
    eight = written(tmp_path / "8", (array // 257).astype(np.uint8), photometric=0)
    assert (eight == 255 - array // 257).all()
