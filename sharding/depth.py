"""Pixels of more than 8 bits, and signed ones: which images hold them, how large they are, how they become 8 bits.

Pillow gives one channel with all its bits. Of several it reads the upper 8 bits alone, so that no range applies to those.
"""

import numpy as np
from PIL import Image

Values = tuple[float, float]
"""The pixel values that become 0 and 255, for images of more than 8 bits."""
GREY, COLOUR = "grey", "colour"
_BITS = 258
_CODESTREAM, _FIRST_DEPTH = b"\xff\x4f\xff\x51", 42


def depth_of(image: Image.Image, payload: bytes) -> str:
    """Return GREY for one channel of more than 8 bits, COLOUR for several, "" for 8 bits; `image` is not loaded yet."""
    if image.mode == "F" or image.mode.startswith("I"):
        return GREY
    return COLOUR if _bits(image, payload) > 8 else ""


def _bits(image: Image.Image, payload: bytes) -> int:
    """Return the bits of a channel that the file names; 8 where its format has no others."""
    if image.format == "PNG":
        return payload[24]
    if image.format == "TIFF":
        return max(image.tag_v2.get(_BITS, (1,)))  # type: ignore[attr-defined]
    if image.format == "PPM":
        largest = image.tile[0].args[-1]  # type: ignore[attr-defined]
        return largest.bit_length() if isinstance(largest, int) else 8
    if image.format == "JPEG2000":
        return (payload[payload.index(_CODESTREAM) + _FIRST_DEPTH] & 127) + 1
    return 8


def highest_of(image: Image.Image, depth: str) -> int:
    """Return the largest value of a loaded image in 0 … 65535; of colours, whose lower 8 bits are gone, a bound on it."""
    if depth == GREY:
        return int(np.asarray(image).max())
    tops = zip(image.getbands(), image.getextrema(), strict=True)
    return max(int(top[1]) for band, top in tops if band not in "Aa") * 256 + 255  # type: ignore[index]


def to_8_bits(image: Image.Image, values: Values | None, kind: str | None) -> Image.Image:
    """Convert single-channel pixels of more than 8 bits to 8: scaled from `values`, or from 0 … 65535 for 16 bits."""
    pixels = np.asarray(image)
    if values is not None:
        low, high = values
        if not np.isfinite(pixels).all():
            raise ValueError("some of its pixels are NaN or infinite")
        scaled = (pixels.astype(np.float64) - low) * (255 / (high - low))
        return Image.fromarray(np.floor(scaled + 0.5).clip(0, 255).astype(np.uint8))
    # Pillow uses mode I for the 32-bit or signed integers of a TIFF, but for the 16-bit pixels of other formats.
    if image.mode == "F" or (image.mode == "I" and kind == "TIFF"):
        what = "32-bit float" if image.mode == "F" else "32-bit or signed"
        found = f"these lie between {pixels.min():g} and {pixels.max():g}"
        raise ValueError(f"{what} pixels have no defined range; give --value-range LOW HIGH ({found})")
    return Image.fromarray(((pixels.astype(np.int64) + 128) // 257).astype(np.uint8))
