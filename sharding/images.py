"""One image: what its bytes hold, and turning them into pixels of the data set's size and mode.

Images are brought to 8 bits, upright, L or RGB:
EXIF orientation is applied; transparency is laid over white; palettes are expanded; CMYK goes through Pillow's plain
formula; 16-bit values v become round(v / 257); of an animation the first frame counts. Another size is reached by
scaling the short side (bicubic, antialiased) and cropping the centre.
"""

import hashlib
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from sharding.shards import decode

# No PostScript, which would start an interpreter, and no container formats.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")
SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
    + (".ppm", ".pgm", ".pbm", ".pnm", ".jp2")
)
_KEPT = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
_ORIENTATION = 0x0112

Item = bytes | NDArray[np.uint8]
"""What a source yields for a sample: an encoded image, or uint8 pixels [H, W, C]."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What a look at an image told. Height and width in pixels after EXIF rotation; `sha256` is of the source bytes.

    `kept_as` is the file extension under which the source bytes may be stored unchanged, or empty: they must be
    converted.
    """

    sha256: bytes
    height: int
    width: int
    grey: bool
    kept_as: str


@dataclass(frozen=True)
class Target:
    """The size in pixels and the number of channels (1 or 3) that all images get."""

    height: int
    width: int
    channels: int

    def keeps(self, seen: Seen) -> bool:
        """Whether the source bytes are stored unchanged: decoders make equal channels of a grey image among colours."""
        fits = (seen.height, seen.width) == (self.height, self.width)
        return bool(seen.kept_as) and fits and (seen.grey or self.channels == 3)


def digest_of(item: Item) -> bytes:
    """Return the sha256, 32 bytes, of a sample's source bytes."""
    return hashlib.sha256(item if isinstance(item, bytes) else item.tobytes()).digest()


def inspect(item: Item) -> Seen:
    """Decode an image in full and say what it holds. Raises ValueError with the reason when it cannot be read."""
    digest = digest_of(item)
    if isinstance(item, np.ndarray):
        return Seen(digest, item.shape[0], item.shape[1], item.shape[2] == 1, "")
    # Pillow's plugins answer damaged files with exceptions of many types.
    try:
        with _strict_on_bombs():
            return _inspect(item, digest)
    except Exception as error:
        raise ValueError(_reason(error)) from error


def _inspect(payload: bytes, digest: bytes) -> Seen:
    with Image.open(io.BytesIO(payload), formats=FORMATS) as image:
        grey = _is_grey(image)
        kept_as = _kept_as(image, payload)
        width, height = image.size
        if kept_as == "jpg":
            # What trains decodes strictly; a JPEG that only a lenient decoder reads is converted.
            try:
                decode(payload, np.empty((height, width, 1 if grey else 3), np.uint8))
            except ValueError:
                kept_as = ""
        if not kept_as:
            width, height = plain(image).size
        elif kept_as != "jpg":
            image.load()
        return Seen(digest, height, width, grey, kept_as)


def _kept_as(image: Image.Image, payload: bytes) -> str:
    deep = image.format == "PNG" and payload[24:25] == b"\x10"
    still = getattr(image, "n_frames", 1) == 1
    upright = image.getexif().get(_ORIENTATION, 1) not in range(2, 9)
    if image.mode not in ("L", "RGB") or "transparency" in image.info or deep or not still or not upright:
        return ""
    return _KEPT.get(image.format or "", "")


def _is_grey(image: Image.Image) -> bool:
    if image.mode == "P":
        palette = np.array(image.getpalette("RGB") or [0, 0, 0]).reshape(-1, 3)
        return bool((palette == palette[:, :1]).all())
    return image.mode in ("1", "L", "LA", "La", "I", "F") or image.mode.startswith("I;16")


def plain(image: Image.Image) -> Image.Image:
    """Return the image upright, in 8 bits, as L where it is single-channel, else as RGB.

    Raises ValueError for pixels without a defined range (32-bit), and what Pillow raises for damaged files.
    """
    grey = _is_grey(image)
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("32-bit float pixels have no defined range")
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _from_16_bits(image)
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        image = white
    return image.convert("L" if grey else "RGB")


def _from_16_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("32-bit pixels have no defined range")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def to_pixels(item: Item, target: Target) -> NDArray[np.uint8]:
    """Decode, convert, scale and crop to uint8 [H, W, C] of the target. Raises ValueError or what Pillow raises."""
    if isinstance(item, np.ndarray):
        image = Image.fromarray(item[:, :, 0] if item.shape[2] == 1 else item)
    else:
        with _strict_on_bombs(), Image.open(io.BytesIO(item), formats=FORMATS) as opened:
            image = plain(opened)
    image = image.convert("L" if target.channels == 1 else "RGB")
    if image.size != (target.width, target.height):
        scale = min(image.width / target.width, image.height / target.height)
        width, height = target.width * scale, target.height * scale
        left, top = (image.width - width) / 2, (image.height - height) / 2
        box = (left, top, left + width, top + height)
        image = image.resize((target.width, target.height), Image.Resampling.BICUBIC, box=box)
    return np.asarray(image).reshape(target.height, target.width, target.channels)


def to_stored(item: Item, seen: Seen, target: Target) -> tuple[str, bytes]:
    """Return (extension, bytes) as they go into the shard: the source's own where they fit, else a PNG."""
    if target.keeps(seen) and isinstance(item, bytes):
        return seen.kept_as, item
    pixels = to_pixels(item, target)
    stream = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if target.channels == 1 else pixels).save(stream, "PNG")
    return "png", stream.getvalue()


@contextmanager
def _strict_on_bombs() -> Iterator[None]:
    """Refuse images whose size looks like an attack; say nothing of damaged metadata, which changes no pixel."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image, or of a format that is not read"
    return " ".join(str(error).split()) or type(error).__name__
