import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_sharding_support import encoded, pixels

from sharding.images import Target, inspect, to_pixels, to_stored
from sharding.shards import decode

RGB, GREY = Target(8, 8, 3), Target(8, 8, 1)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def stored(payload: bytes, target: Target) -> tuple[str, bytes, np.ndarray]:
    """Extension, bytes and pixels of an image as a reader of the shard gets them."""
    suffix, data = to_stored(payload, inspect(payload), target)
    out = np.empty((target.height, target.width, target.channels), np.uint8)
    decode(data, out)
    return suffix, data, out


@pytest.mark.parametrize(("kind", "suffix"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")])
def test_bytes_that_fit_are_kept(kind, suffix):
    payload = encoded(pixels(0), kind)
    assert stored(payload, RGB)[:2] == (suffix, payload)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_single_channel_bytes_are_kept_among_colours_too_and_give_equal_channels(kind):
    payload = encoded(pixels(0, channels=1), kind)
    assert inspect(payload).grey
    assert stored(payload, GREY)[1] == payload
    _, data, out = stored(payload, RGB)
    assert data == payload
    assert (out == stored(payload, GREY)[2]).all()
    assert (out == np.asarray(Image.open(io.BytesIO(payload)).convert("RGB"))).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_colours_do_not_decode_into_a_single_channel(kind):
    with pytest.raises(ValueError, match="8x8 .* where 8x8 grey is expected"):
        decode(encoded(pixels(0), kind), np.empty((8, 8, 1), np.uint8))


@pytest.mark.parametrize("kind", ["BMP", "TIFF", "GIF", "PPM"])
def test_other_formats_become_png(kind):
    image = pixels(0) // 128 * 255
    suffix, _, out = stored(encoded(image, kind), RGB)
    assert suffix == "png"
    assert (out == image).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_exif_orientation_is_applied(orientation, kind):
    rotations = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
        8: lambda a: np.rot90(a),
    }
    flat = np.repeat(np.repeat(pixels(0, 2, 3), 8, 0), 8, 1)
    exif = Image.Exif()
    exif[0x0112] = orientation
    payload = encoded(flat, kind, exif=exif)
    seen = inspect(payload)
    expected = rotations[orientation](flat)
    assert (seen.height, seen.width) == expected.shape[:2]
    assert bool(seen.kept_as) == (orientation == 1)
    out = stored(payload, Target(seen.height, seen.width, 3))[2]
    assert np.abs(out.astype(int) - expected).mean() < (1 if kind == "PNG" else 30)


def test_transparency_is_laid_over_white():
    image = np.zeros((8, 8, 4), np.uint8)
    image[:4, :, 3] = 255
    out = stored(encoded(image), RGB)[2]
    assert (out[:4] == 0).all()
    assert (out[4:] == 255).all()


def test_transparent_colour_of_a_palette_and_of_rgb_is_laid_over_white():
    image = Image.fromarray(np.array([[0, 1]] * 2, np.uint8), "P")
    image.putpalette([255, 0, 0, 0, 0, 255])
    out = stored(saved(image, "PNG", transparency=1), Target(2, 2, 3))[2]
    assert out[0].tolist() == [[255, 0, 0], [255, 255, 255]]
    rgb = image.convert("RGB")
    out = stored(saved(rgb, "PNG", transparency=(255, 0, 0)), Target(2, 2, 3))[2]
    assert out[0].tolist() == [[255, 255, 255], [0, 0, 255]]


def test_palettes_are_expanded_and_grey_ones_count_as_grey():
    colour, grey = Image.fromarray(pixels(0)).quantize(16), Image.new("P", (8, 8), 1)
    grey.putpalette([0, 0, 0, 90, 90, 90])
    assert (stored(saved(colour, "PNG"), RGB)[2] == np.asarray(colour.convert("RGB"))).all()
    assert not inspect(saved(colour, "PNG")).grey
    assert inspect(saved(grey, "PNG")).grey
    assert (stored(saved(grey, "PNG"), GREY)[2] == 90).all()


def test_cmyk_becomes_rgb():
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    suffix, _, out = stored(saved(image, "JPEG"), RGB)
    assert suffix == "png"
    assert np.abs(out.astype(int) - [255, 0, 0]).max() <= 3


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bits_are_scaled_to_8(kind):
    values = np.array([[0, 128, 129, 257, 65535, 32896, 65407, 65406]] * 8, np.uint16)
    out = stored(encoded(values, kind), GREY)[2]
    assert out[0, :, 0].tolist() == [0, 0, 1, 1, 255, 128, 255, 254]


def test_bits_and_grey_with_alpha_are_single_channel():
    bits = Image.fromarray(pixels(0, channels=1) > 127)
    assert (stored(saved(bits, "PNG"), GREY)[2][:, :, 0] == np.asarray(bits) * 255).all()
    alpha = Image.fromarray(np.full((8, 8, 2), (100, 255), np.uint8), "LA")
    assert inspect(saved(alpha, "PNG")).grey
    assert (stored(saved(alpha, "PNG"), GREY)[2] == 100).all()


def test_the_first_frame_of_an_animation_counts():
    frames = [Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (10, 200)]
    payload = saved(frames[0], "PNG", save_all=True, append_images=frames[1:])
    assert not inspect(payload).kept_as
    assert (stored(payload, RGB)[2] == 10).all()


def test_float_pixels_are_refused():
    with pytest.raises(ValueError, match="float pixels have no defined range"):
        inspect(saved(Image.new("F", (8, 8)), "TIFF"))


def test_another_size_is_reached_by_scaling_the_short_side_and_cropping_the_centre():
    wide = pixels(0, 16, 48)
    for image in (wide, wide.transpose(1, 0, 2)):
        height, width = image.shape[0] // 2, image.shape[1] // 2
        scaled = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)).astype(int)
        top, left = (height - 8) // 2, (width - 8) // 2
        out = stored(encoded(image), RGB)[2]
        assert np.abs(scaled[top : top + 8, left : left + 8] - out).max() <= 1
    small = np.full((4, 5, 3), 7, np.uint8)
    assert (stored(encoded(small), RGB)[2] == 7).all()


def test_arrays_are_stored_losslessly():
    for array, target in ((pixels(0), RGB), (pixels(0, channels=1)[:, :, None], GREY)):
        suffix, data = to_stored(array, inspect(array), target)
        out = np.empty_like(array)
        decode(data, out)
        assert suffix == "png"
        assert (out == array).all()


def test_a_jpeg_that_only_a_lenient_decoder_reads_is_damaged():
    payload = encoded(pixels(0, 64, 64), "JPEG")
    odd = bytearray(payload)
    odd[1777] = 215  # a marker inside the picture's data: libjpeg warns of a corrupt file and goes on
    odd = bytes(odd)
    with pytest.raises(ValueError, match="Corrupt JPEG"):
        decode(odd, np.empty((64, 64, 3), np.uint8))
    assert inspect(payload).kept_as == "jpg"
    assert np.asarray(Image.open(io.BytesIO(odd))).shape == (64, 64, 3)  # Pillow fills it with grey, and says nothing
    with pytest.raises(ValueError, match="Corrupt JPEG"):
        inspect(odd)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_damaged_images_raise_value_error_or_are_read(kind, data):
    payload = bytearray(encoded(pixels(1, 16, 16), kind))
    if data.draw(st.booleans()):
        payload = payload[: data.draw(st.integers(0, len(payload) - 1))]
    else:
        for _ in range(data.draw(st.integers(1, 4))):
            payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    payload = bytes(payload)
    try:
        seen = inspect(payload)
    except ValueError:
        return
    target = Target(8, 8, 3)
    assert to_pixels(payload, target).shape == (8, 8, 3)
    if seen.kept_as:
        decode(payload, np.empty((seen.height, seen.width, 1 if seen.grey else 3), np.uint8))


def test_a_decompression_bomb_is_refused():
    bomb = saved(Image.new("1", (20000, 20000)), "PNG")
    assert len(bomb) < 100_000
    with pytest.raises(ValueError, match="decompression bomb"):
        inspect(bomb)
