"""Values survive: what decodes with guesses is damaged, ranges are never guessed, metadata stops no pixel."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from test_sharding_left_out import stored
from test_sharding_support import encoded, pixels, write_folder

from sharding.encode import mean_and_std
from sharding.errors import UserError
from sharding.images import Target, inspect, to_pixels
from sharding.options import Options
from sharding.shards import decode
from sharding.verify import verify
from sharding.writer import build

CUT = Options(workers=1, test_fraction=0.2)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def read(payload: bytes, values=None) -> np.ndarray:
    seen = inspect(payload, values)
    return to_pixels(payload, Target(seen.height, seen.width, 1 if seen.grey else 3, values))


def jpeg(array: np.ndarray, **options: object) -> bytes:
    return encoded(array, "JPEG", quality=90, **options)


@pytest.mark.parametrize("kind", ["RGB", "grey", "turned", "CMYK"])
@pytest.mark.parametrize("damage", ["cut", "marker"])
def test_a_jpeg_that_only_a_lenient_decoder_reads_is_named(kind, damage, tmp_path):
    image = pixels(0, 64, 64, 1 if kind == "grey" else 3)
    exif = Image.Exif()
    exif[0x0112] = 6
    if kind == "CMYK":
        stream = io.BytesIO()
        Image.fromarray(image).convert("CMYK").save(stream, "JPEG")
        payload = stream.getvalue()
    else:
        payload = jpeg(image, exif=exif) if kind == "turned" else jpeg(image)
    assert inspect(payload).kept_as == ("jpg" if kind in ("RGB", "grey") else "")
    at = len(payload) * 3 // 4
    bad = payload[:at] + (b"\xff\xd9" if damage == "cut" else b"\xff\xd7" + payload[at + 2 :])
    np.asarray(Image.open(io.BytesIO(bad)))  # Pillow fills it, and says nothing
    with pytest.raises(ValueError, match="Corrupt JPEG|Premature end"):
        inspect(bad)
    folder = write_folder(tmp_path / "s", {"a": 3, "b": 3}, size=64)
    (folder / "a/bad.jpg").write_bytes(bad)
    with pytest.raises(UserError, match=r"cannot read a/bad\.jpg"):
        build(f"folder:{folder}", tmp_path / "d", CUT)


TEXTS = [
    chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2**21))),
    chunk(b"iTXt", b"k\0\1\0\0\0" + zlib.compress(bytes(2**21))),
    chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(2**21))),
    chunk(b"tEXt", b"k\0" + b"x" * 2**20) * 70,
]


@pytest.mark.parametrize("text", TEXTS, ids=["zTXt", "iTXt", "iCCP", "tEXt"])
@pytest.mark.parametrize("last", [False, True])
def test_long_texts_of_a_png_stop_no_pixel(text, last, tmp_path):
    image = pixels(3)
    plain = encoded(image)
    at = len(plain) - 12 if last else 33
    payload = plain[:at] + text + plain[at:]
    assert (read(payload) == image).all()
    folder = write_folder(tmp_path / "s", {"a": 6, "b": 6})
    (folder / "a/long.png").write_bytes(payload)
    build(f"folder:{folder}", tmp_path / "d", CUT)
    verify(tmp_path / "d", deep=True, log=lambda _line: None)
    assert (image.tobytes(), 0) in stored(tmp_path / "d")


def broken(kind: bytes, data: bytes) -> bytes:
    """A chunk whose checksum is wrong."""
    return chunk(kind, data)[:-1] + bytes([chunk(kind, data)[-1] ^ 1])


BAD_CHUNKS = {name: chunk(name.encode(), b"\0") for name in ("pHYs", "gAMA", "cHRM", "acTL", "tIME", "fcTL")}
BAD_CHUNKS |= {
    "sRGB": chunk(b"sRGB", b""),
    "tIME-crc": broken(b"tIME", bytes(7)),
    "eXIf-crc": broken(b"eXIf", b"II*\0"),
}
BAD_CHUNKS |= {"private-crc": broken(b"prVt", b"z" * 99), "iCCP": chunk(b"iCCP", b"x\0\0junk")}


@pytest.mark.parametrize("name", BAD_CHUNKS)
@pytest.mark.parametrize("transparent", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_damaged_chunks_of_a_png_stop_no_pixel(name, transparent, last):
    image = pixels(3)
    plain = encoded(image, **({"transparency": tuple(map(int, image[2, 2]))} if transparent else {}))
    at = len(plain) - 12 if last else 33
    found = read(plain[:at] + BAD_CHUNKS[name] + plain[at:])
    assert (found == read(plain)).all()
    assert (found[2, 2] == (255 if transparent else image[2, 2])).all()


def test_a_damaged_chunk_that_pixels_depend_on_is_damage():
    plain = encoded(pixels(3), transparency=(1, 2, 3))
    at = plain.index(b"tRNS") + 4
    with pytest.raises(ValueError):
        inspect(plain[:at] + bytes([plain[at] ^ 1]) + plain[at + 1 :])


def segment(marker: int, data: bytes) -> bytes:
    return bytes([255, marker]) + struct.pack(">H", len(data) + 2) + data


PHOTOSHOP = b"Photoshop 3.0\0" + b"8BIM\x03\xed\0\0\0\0\0\x10"
BAD_SEGMENTS = {
    "icc": segment(0xE2, b"ICC_PROFILE\0\5\2junk"),
    "icc twice": segment(0xE2, b"ICC_PROFILE\0\1\1junk") * 2,
    "icc short": segment(0xE2, b"ICC_PROFILE\0"),
    "photoshop": segment(0xED, PHOTOSHOP),
    "photoshop name": segment(0xED, b"Photoshop 3.0\x008BIM\x03\xed"),
    "jfif": segment(0xE0, b"JFIF\0"),
    "adobe": segment(0xEE, b"Adobe"),
    "mpf": segment(0xE2, b"MPF\0II*\0"),
}


@pytest.mark.parametrize("name", BAD_SEGMENTS)
@pytest.mark.parametrize("kind", ["RGB", "grey", "turned", "CMYK", "as RGB"])
def test_damaged_segments_of_a_jpeg_stop_no_pixel(name, kind):
    image, exif, stream = pixels(3, 16, 24, 1 if kind == "grey" else 3), Image.Exif(), io.BytesIO()
    exif[0x0112] = 6 if kind == "turned" else 1
    options = {"keep_rgb": True} if kind == "as RGB" else {}
    Image.fromarray(image).convert("CMYK" if kind == "CMYK" else None).save(stream, "JPEG", exif=exif, **options)
    plain = stream.getvalue()
    payload = plain[:2] + BAD_SEGMENTS[name] + plain[2:]
    found = read(payload)
    assert found.shape[:2] == ((24, 16) if kind == "turned" else (16, 24))
    assert (found == read(plain)).all()


def test_a_jpeg_with_a_damaged_colour_profile_is_stored_as_its_pixels(tmp_path):
    plain = jpeg(pixels(3))
    folder = write_folder(tmp_path / "s", {"a": 6, "b": 6})
    (folder / "a/profile.jpg").write_bytes(plain[:2] + BAD_SEGMENTS["icc"] + plain[2:])
    build(f"folder:{folder}", tmp_path / "d", CUT)
    verify(tmp_path / "d", deep=True, log=lambda _line: None)
    assert (Image.open(io.BytesIO(plain)).tobytes(), 0) in stored(tmp_path / "d")


def test_short_texts_are_kept_with_the_bytes():
    info = PngImagePlugin.PngInfo()
    info.add_text("k", "text", zip=True)
    payload = encoded(pixels(3), pnginfo=info)
    assert inspect(payload).kept_as == "png"


@pytest.mark.parametrize("exif", [b"rubbish", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff" + b"\1\x12" * 40])
def test_damaged_metadata_stops_no_pixel(exif):
    exif = b"Exif\0\0" + exif
    image = np.full((8, 8, 3), 90, np.uint8)
    assert np.abs(read(jpeg(image, exif=exif)).astype(int) - image).max() < 3
    assert (read(encoded(image, exif=exif)) == image).all()


def test_a_damaged_png_stays_damaged():
    payload = bytearray(encoded(pixels(3, 32, 32)))
    payload[200] ^= 255
    with pytest.raises(ValueError):
        inspect(bytes(payload))


DEEP = {
    "int32": np.arange(64, dtype=np.int32).reshape(8, 8) * 4,
    "int16": np.arange(64, dtype=np.int16).reshape(8, 8) * 500,
    "float32": np.arange(64, dtype=np.float32).reshape(8, 8) / 63,
}


@pytest.mark.parametrize("kind", DEEP)
def test_values_without_a_range_are_refused_until_it_is_given(kind, tmp_path):
    values = DEEP[kind]
    low, high = float(values.min()), float(values.max())
    folder = write_folder(tmp_path / "s", {"a": 6, "b": 6}, channels=1)
    Image.fromarray(values).save(folder / "a/deep.tif")
    with pytest.raises(
        UserError,
        match=rf"deep\.tif .*no defined range; give --value-range LOW HIGH \(these lie between 0 and {high:g}\)",
    ):
        build(f"folder:{folder}", tmp_path / "d", CUT)
    options = Options(workers=1, test_fraction=0.2, value_range=(low, high))
    build(f"folder:{folder}", tmp_path / "d", options)
    scaled = np.floor(values.astype(float) / high * 255 + 0.5).astype(np.uint8)
    assert (scaled.tobytes(), 0) in stored(tmp_path / "d")
    other = build(
        f"folder:{folder}", tmp_path / "e", Options(workers=1, test_fraction=0.2, value_range=(low, high / 2))
    )
    assert other.manifest.splits != build(f"folder:{folder}", tmp_path / "d", options).manifest.splits
    with pytest.raises(UserError, match="already holds a different"):
        build(f"folder:{folder}", tmp_path / "d", Options(workers=1, test_fraction=0.2, value_range=(low, high / 2)))


def test_the_range_of_eight_bits_stays():
    image = pixels(0, channels=1)
    assert (read(encoded(image), (0.0, 10.0))[:, :, 0] == image).all()


@pytest.mark.parametrize(("high", "says"), [(255, "refused"), (4095, "said"), (65535, "")])
@pytest.mark.parametrize("kind", ["png", "tif", "pgm"])
def test_sixteen_bits_that_use_a_part_of_them_are_not_darkened_without_a_word(tmp_path, high, says, kind):
    folder, lines = tmp_path / "s", list[str]()
    ramp = np.linspace(0, high, 64).round().astype(np.uint16).reshape(8, 8)
    for name in "ab":
        (folder / name).mkdir(parents=True)
        for i in range(6):
            Image.fromarray(np.roll(ramp, i)).save(folder / name / f"{i}.{kind}")
    if says == "refused":
        with pytest.raises(UserError, match="no pixel of 12 16-bit images is above 255, .*give --value-range 0 255"):
            build(f"folder:{folder}", tmp_path / "d", CUT)
    else:
        build(f"folder:{folder}", tmp_path / "d", CUT, log=lines.append)
        assert ((((ramp.astype(int) + 128) // 257).astype(np.uint8).tobytes(), 0)) in stored(tmp_path / "d")
        assert any(f"--value-range 0 {high} spreads them over all shades" in line for line in lines) == (says == "said")
    build(f"folder:{folder}", tmp_path / "e", Options(workers=1, test_fraction=0.2, value_range=(0, high)))
    spread = np.floor(ramp / high * 255 + 0.5).astype(np.uint8)
    assert (spread.tobytes(), 0) in stored(tmp_path / "e")


@pytest.mark.parametrize("values", [(1.0, 1.0), (5.0, 2.0), (float("nan"), 1.0), (0.0, float("inf"))])
def test_a_range_that_is_none_is_refused(values):
    with pytest.raises(UserError, match="--value-range is"):
        Options(value_range=values)


def test_pixels_that_are_no_numbers_are_refused():
    image = np.full((8, 8), np.nan, np.float32)
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "TIFF")
    with pytest.raises(ValueError, match="some of its pixels are NaN or infinite"):
        inspect(stream.getvalue(), (0, 1))


@pytest.mark.parametrize("flat", [[2], [0, 1, 2]])
def test_a_constant_channel_has_the_deviation_one_and_is_said_once(tmp_path, flat):
    folder = tmp_path / "s"
    for k, name in enumerate("ab"):
        (folder / name).mkdir(parents=True)
        for i in range(8):
            image = pixels(i + 10 * k)
            image[..., flat] = 7
            (folder / name / f"{i}.png").write_bytes(encoded(image))
    lines: list[str] = []
    manifest = build(f"folder:{folder}", tmp_path / "d", CUT, log=lines.append).manifest
    assert [s == 1.0 for s in manifest.std] == [c in flat for c in range(3)]
    assert manifest.mean[2] == 7 / 255
    said = [line for line in lines if "its standard deviation is set to 1" in line]
    assert len(said) == 1
    assert said[0].startswith("channel " + ", ".join(str(c + 1) for c in flat) + " is constant in train")
    verify(tmp_path / "d", deep=True, log=lambda _line: None)


def test_the_deviation_of_what_varies_a_little_is_its_own():
    assert mean_and_std(np.array([[1], [1]]), 10**9)[1][0] == pytest.approx((1e-9) ** 0.5 / 255, rel=1e-6)
    decode(encoded(pixels(0)), np.empty((8, 8, 3), np.uint8))
