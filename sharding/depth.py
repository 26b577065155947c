"""Pixels of more than 8 bits, and signed ones: which images hold them, how large they are, how they become 8 bits.

Pillow gives one channel with all its bits. Of several it reads the upper 8 bits alone, so that no range applies to those.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Values = tuple[float, float]
"""The pixel values that become 0 and 255, for images of more than 8 bits."""
GREY, COLOUR = "grey", "colour"
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # tags of a TIFF
_MIN_IS_WHITE, _UNSIGNED, _SIGNED = 0, 1, 2
_CODESTREAM, _FIRST_DEPTH = b"\xff\x4f\xff\x51", 42


def depth_of(image: Image.Image, payload: bytes) -> str:
    """Return GREY for one channel of more than 8 bits, or signed, COLOUR for several, "" for 8 bits; `image` is not loaded yet."""
    if is_deep_grey(image):
        return GREY
    return COLOUR if _bits(image, payload) > 8 else ""


def is_deep_grey(image: Image.Image) -> bool:
    """Whether the image has one channel of more than 8 bits, or of signed ones, which Pillow gives as unsigned."""
    signed = image.mode == "L" and _tag(image, _SAMPLE_FORMAT, _UNSIGNED) == _SIGNED
    return signed or image.mode == "F" or image.mode.startswith("I")


def _tag(image: Image.Image, number: int, default: int) -> int:
    """Return a tag of a TIFF, the largest one of several channels; `default` for other formats, too."""
    found = image.tag_v2.get(number, default) if image.format == "TIFF" else default  # type: ignore[attr-defined]
    return max(found) if isinstance(found, tuple) else found


def _bits(image: Image.Image, payload: bytes) -> int:
    """Return the bits of a channel that the file names; 8 where its format has no others."""
    if image.format == "PNG":
        return payload[24]
    if image.format == "TIFF":
        return _tag(image, _BITS, 1)
    if image.format == "PPM":
        largest = image.tile[0].args[-1]  # type: ignore[attr-defined]
        return largest.bit_length() if isinstance(largest, int) else 8
    if image.format == "JPEG2000":
        return (payload[payload.index(_CODESTREAM) + _FIRST_DEPTH] & 127) + 1
    return 8


def highest_of(image: Image.Image, depth: str) -> int:
    """Return the largest value of a loaded image in 0 … 65535; of colours, whose lower 8 bits are gone, a bound on it."""
    if depth == GREY:
        return int(_numbers(image).max())
    tops = zip(image.getbands(), image.getextrema(), strict=True)
    return max(int(top[1]) for band, top in tops if band not in "Aa") * 256 + 255  # type: ignore[index]


def to_8_bits(image: Image.Image, values: Values | None) -> Image.Image:
    """Convert a loaded image with `is_deep_grey` to 8 bits: scaled from `values`, or from 0 … 65535 for 16 bits.

    Where a TIFF says that its smallest value is white, the result is inverted. Raises ValueError without a range.
    """
    pixels = _numbers(image)
    if values is not None:
        low, high = values
        if not np.isfinite(pixels).all():
            raise ValueError("some of its pixels are NaN or infinite")
        scaled = (pixels.astype(np.float64) - low) * (255 / (high - low))
        shades = np.floor(scaled + 0.5).clip(0, 255).astype(np.uint8)
    # Pillow uses mode I for the 32-bit or signed integers of a TIFF, but for the 16-bit pixels of other formats.
    elif image.mode in ("F", "L") or (image.mode == "I" and image.format == "TIFF"):
        what = "32-bit float" if image.mode == "F" else "32-bit or signed"
        found = f"these lie between {pixels.min():g} and {pixels.max():g}"
        raise ValueError(f"{what} pixels have no defined range; give --value-range LOW HIGH ({found})")
    else:
        shades = ((pixels.astype(np.int64) + 128) // 257).astype(np.uint8)
    inverted = _tag(image, _PHOTOMETRIC, 1) == _MIN_IS_WHITE
    return Image.fromarray(255 - shades if inverted else shades)


def _numbers(image: Image.Image) -> NDArray[Any]:
    """Return the pixels of one channel [H, W] as the numbers that the file means: Pillow takes the sign of some wrongly."""
    pixels = np.asarray(image)
    if image.mode == "L":
        return pixels.view(np.int8)
    if image.format == "TIFF" and image.mode == "I" and _tag(image, _SAMPLE_FORMAT, _UNSIGNED) == _UNSIGNED:
        return pixels.view(np.uint32)
    return pixels
