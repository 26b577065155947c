"""One image: what its bytes hold, and turning them into pixels of the data set's size and mode.

Images are brought to 8 bits, upright, L or RGB:
EXIF orientation is applied; transparency is laid over white; palettes are expanded; CMYK goes through Pillow's plain
formula; 16-bit values v become round(v / 257); pixels without a defined range (32-bit integers, floats) are refused
unless the user gives the range; of 16-bit colours Pillow gives the upper 8 bits; only the first frame of an animation
is used. To change the size, the short side is scaled (bicubic, antialiased) and the centre is cropped.
"""

import hashlib
import io
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, features

from sharding.depth import COLOUR, Values, depth_of, highest_of, is_deep_grey, to_8_bits
from sharding.metadata import bare
from sharding.shards import decode

# PostScript is missing because it would start an interpreter; container formats are missing, too.
_AVIF = ["AVIF"] if features.check("avif") else []
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", *_AVIF)
_SUFFIXES = "jpg jpeg jpe jfif jif pjpeg png apng webp avif bmp gif tif tiff ppm pgm pbm pnm jp2 j2k jpx"
SUFFIXES = frozenset(f".{suffix}" for suffix in _SUFFIXES.split())
_KEPT = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
_ORIENTATION = 0x0112
_TURN = Image.Transpose
_TURNS = dict(enumerate((_TURN.FLIP_LEFT_RIGHT, _TURN.ROTATE_180, _TURN.FLIP_TOP_BOTTOM, _TURN.TRANSPOSE), 2))
_TURNS |= dict(enumerate((_TURN.ROTATE_270, _TURN.TRANSVERSE, _TURN.ROTATE_90), 6))
Result = TypeVar("Result")
Item = bytes | NDArray[np.uint8]
"""What a source yields for a sample: an encoded image, or uint8 pixels [H, W, C]."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What inspecting an image found. Height and width in pixels after EXIF rotation; `sha256` is of the source bytes.

    `kept_as` is the file extension under which the source bytes may be stored unchanged, or empty if they must be
    converted. `depth`: COLOUR if several channels have more than 8 bits, GREY if one has, else empty. `highest`: the
    largest value of a 16-bit image that is read as 0 … 65535 (a bound for colours), else -1. `further`: the number of pages or frames after
    the first, which are not used.
    """

    sha256: bytes
    height: int
    width: int
    grey: bool
    kept_as: str
    depth: str = ""
    highest: int = -1
    further: int = 0


@dataclass(frozen=True)
class Target:
    """The size in pixels and the number of channels (1 or 3) of all images, and the range of values for those of more than 8 bits."""

    height: int
    width: int
    channels: int
    values: Values | None = None

    def keeps(self, seen: Seen) -> bool:
        """Whether the source bytes are stored unchanged; a grey image fits 3 channels, because decoders repeat its channel."""
        fits = (seen.height, seen.width) == (self.height, self.width)
        return bool(seen.kept_as) and fits and (seen.grey or self.channels == 3)


def digest_of(item: Item) -> bytes:
    """Return the sha256, 32 bytes, of a sample's source bytes."""
    return hashlib.sha256(item if isinstance(item, bytes) else item.tobytes()).digest()


def inspect(item: Item, values: Values | None = None) -> Seen:
    """Decode an image in full and say what it holds. Raises ValueError with the reason when it cannot be read."""
    digest = digest_of(item)
    if isinstance(item, np.ndarray):
        return Seen(digest, item.shape[0], item.shape[1], item.shape[2] == 1, "")
    # Pillow's plugins raise exceptions of many types for damaged files.
    try:
        seen = _from_pixels(lambda image, payload: _inspect(image, payload, values), item)
    except Image.UnidentifiedImageError as error:
        raise ValueError("not an image, or an image of an unsupported format") from error
    except Exception as error:
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error
    return replace(seen, sha256=digest, kept_as=seen.kept_as if seen.sha256 == digest else "")


def _inspect(image: Image.Image, payload: bytes, values: Values | None) -> Seen:
    depth, highest = depth_of(image, payload), -1
    grey, further = _is_grey(image), 0 if image.format == "TIFF" else getattr(image, "n_frames", 1) - 1
    kept_as = "" if depth or further else _kept_as(image)
    width, height = image.size
    if kept_as:
        # Decoded again by the decoder of training, which accepts fewer files than Pillow.
        decode(payload, np.empty((height, width, 1 if grey else 3), np.uint8))
    else:
        if payload[:2] == b"\xff\xd8":
            simplejpeg.decode_jpeg(payload, "CMYK" if image.mode == "CMYK" else "RGB")
        width, height = plain(image, values).size
        if depth == COLOUR or (depth and values is None):
            highest = highest_of(image, depth)
        if image.format == "TIFF":
            further = _further_pages(image)
    return Seen(digest_of(payload), height, width, grey, kept_as, depth, highest, further)


def _from_pixels(function: Callable[[Image.Image, bytes], Result], payload: bytes) -> Result:
    """Call `function` with the opened image and its bytes; for a PNG or JPEG that it cannot read, again without metadata."""
    with warnings.catch_warnings():
        # Warnings about damaged metadata are ignored, because no pixel changes; a size that looks like an attack is refused.
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(io.BytesIO(payload), formats=FORMATS) as image:
                return function(image, payload)
        except Exception:  # Pillow's plugins raise many types, here also for metadata
            if (rest := bare(payload)) == payload:
                raise
            with Image.open(io.BytesIO(rest), formats=FORMATS) as image:
                return function(image, rest)


def _further_pages(image: Image.Image) -> int:
    """Return the number of pages after the first of a TIFF; one if they are damaged. The image is of no use afterwards."""
    try:
        return image.n_frames - 1  # type: ignore[attr-defined]
    except Exception:  # of many types, as above
        return 1


def _kept_as(image: Image.Image) -> str:
    upright = _turn(image) is None
    if image.mode not in ("L", "RGB") or "transparency" in image.info or not upright:
        return ""
    return _KEPT.get(image.format or "", "")


def _is_grey(image: Image.Image) -> bool:
    if image.mode == "P":
        palette = np.array(image.getpalette("RGB") or [0, 0, 0]).reshape(-1, 3)
        return bool((palette == palette[:, :1]).all())
    return image.mode in ("1", "L", "LA", "La", "I", "F") or image.mode.startswith("I;16")


def _turn(image: Image.Image) -> Image.Transpose | None:
    """Return the operation that turns the image upright; None if its metadata name no orientation or are damaged."""
    # Pillow raises exceptions of many types for damaged metadata, too; the pixels are still usable.
    with suppress(Exception):
        return _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    return None


def plain(image: Image.Image, values: Values | None = None) -> Image.Image:
    """Return the image upright, in 8 bits, as L if it has a single channel, else as RGB.

    Raises ValueError for pixels without a defined range where `values` is None, and what Pillow raises for damaged files.
    """
    grey = _is_grey(image)
    image.load()  # loading also turns a TIFF upright
    turn = _turn(image)
    if is_deep_grey(image):
        image = to_8_bits(image, values)
    if turn is not None:
        image = image.transpose(turn)
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        image = white
    return image.convert("L" if grey else "RGB")


def to_pixels(item: Item, target: Target) -> NDArray[np.uint8]:
    """Decode, convert, scale and crop to uint8 [H, W, C] of the target. Raises ValueError or what Pillow raises."""
    if isinstance(item, np.ndarray):
        image = Image.fromarray(item[:, :, 0] if item.shape[2] == 1 else item)
    else:
        image = _from_pixels(lambda opened, _: plain(opened, target.values), item)
    image = image.convert("L" if target.channels == 1 else "RGB")
    if image.size != (target.width, target.height):
        scale = min(image.width / target.width, image.height / target.height)
        width, height = target.width * scale, target.height * scale
        left, top = (image.width - width) / 2, (image.height - height) / 2
        box = (left, top, left + width, top + height)
        image = image.resize((target.width, target.height), Image.Resampling.BICUBIC, box=box)
    return np.asarray(image).reshape(target.height, target.width, target.channels)


def to_stored(item: Item, seen: Seen, target: Target) -> tuple[str, bytes]:
    """Return (extension, bytes) as they go into the shard: the source bytes if they fit, else a PNG."""
    if target.keeps(seen) and isinstance(item, bytes):
        return seen.kept_as, item
    pixels = to_pixels(item, target)
    stream = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if target.channels == 1 else pixels).save(stream, "PNG")
    return "png", stream.getvalue()
