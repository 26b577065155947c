"""Sample i → its encoded bytes and label, by memory map; and decoding those bytes."""

import io
import mmap
from bisect import bisect_right
from collections.abc import Callable
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from sharding.errors import UserError
from sharding.files import sha256_file
from sharding.manifest import Manifest, ShardInfo

# Each memory map needs a file descriptor, and a data set may have more shards than a process may have descriptors.
OPEN_SHARDS = 256
_COLORSPACES = {1: ("Gray",), 3: ("YCbCr", "RGB", "Gray")}
_MODES = {1: ("L",), 3: ("RGB", "L")}


class Shards:
    """Memory-mapped access to one split. Samples are counted in (shard, row) order: as in the manifest, then the index.

    Attributes:
        samples: number of samples N.
        labels: int64 [N].
        shard_samples: number of samples of each shard.
        payload_bytes: of all encoded images.
    """

    def __init__(
        self,
        directory: Path | str,
        manifest: Manifest,
        split: str,
        fetch: Callable[[ShardInfo], BinaryIO] | None = None,
        most_open: int = OPEN_SHARDS,
    ) -> None:
        """Read the split's indexes. Raises UserError naming the file that does not agree with the manifest.

        `fetch` opens a shard that may not be in the directory yet; `most_open` shards are mapped at a time.
        """
        if split not in manifest.splits:
            raise UserError(f"{directory} has no split {split}; it has {', '.join(manifest.splits)}")
        self._directory = Path(directory)
        self._infos = manifest.splits[split].shards
        self.shard_samples = tuple(info.samples for info in self._infos)
        self.samples = sum(self.shard_samples)
        self._starts = [0, *accumulate(self.shard_samples)]
        self._fetch = fetch
        classes = len(manifest.classes)
        indexes = [read_index(self._directory, info, classes, remote=fetch is not None) for info in self._infos]
        index = np.concatenate(indexes)
        self._offsets, self._sizes = index[:, 0].copy(), index[:, 1].copy()
        self.labels: NDArray[np.int64] = index[:, 2].copy()
        self.payload_bytes = int(self._sizes.sum())
        counts = np.bincount(self.labels, minlength=len(manifest.classes))
        if tuple(counts.tolist()) != manifest.splits[split].class_counts:
            where = self._directory / split
            raise UserError(f"the indexes in {where} do not match the manifest's class counts; build it again")
        self._map = lru_cache(maxsize=min(most_open, OPEN_SHARDS))(self._open)

    def locate(self, i: int) -> tuple[int, int]:
        """Return (shard, row) of sample i, 0 ≤ i < samples. Raises IndexError outside."""
        if not 0 <= i < self.samples:
            raise IndexError(f"sample {i} of {self.samples}")
        shard = bisect_right(self._starts, i) - 1
        return shard, i - self._starts[shard]

    def payload(self, i: int) -> memoryview:
        """Return the bytes of encoded image i, a view into the memory map (no copy)."""
        shard, _ = self.locate(i)
        offset = int(self._offsets[i])
        return self._map(shard)[offset : offset + int(self._sizes[i])]

    def payloads(self, indices: NDArray[np.int64]) -> list[memoryview]:
        """Return `payload` of each index, int64 [n]; faster than single calls, because offsets are computed together."""
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < self.samples:
            raise IndexError(f"a sample outside 0 … {self.samples - 1}")
        shards = np.searchsorted(self._starts, indices, side="right") - 1
        starts = self._offsets[indices]
        ends = starts + self._sizes[indices]
        maps = {shard: self._map(shard) for shard in np.unique(shards).tolist()}
        spans = zip(shards.tolist(), starts.tolist(), ends.tolist(), strict=True)
        return [maps[shard][start:end] for shard, start, end in spans]

    def _open(self, shard: int) -> memoryview:
        info = self._infos[shard]
        path = self._directory / info.file
        try:
            with self._fetch(info) if self._fetch else path.open("rb") as stream:
                view = memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {path} ({error}); build the dataset again") from None
        _check_size(path, len(view), info)
        return view


def read_index(directory: Path, info: ShardInfo, classes: int, *, remote: bool = False) -> NDArray[np.int64]:
    """Read a shard's index, int64 [samples, 3]: payload offset, size in bytes, label. `remote`: the tar may be missing.

    Raises UserError naming the file when the tar's size, the number of rows, an offset or a label does not agree with
    the manifest.
    """
    tar, path, cure = directory / info.file, directory / info.index_file, "build the dataset again"
    try:
        if not remote:
            _check_size(tar, tar.stat().st_size, info)
        with path.open("rb") as stream:
            index = np.lib.format.read_array(stream, allow_pickle=False)
    except OSError as error:
        raise UserError(f"cannot read {error.filename or path} ({error.strerror or error}); {cure}") from None
    # numpy raises exceptions of many types for a damaged header.
    except Exception as error:
        raise UserError(f"{path} is not an index ({error}); {cure}") from None
    if index.dtype != np.int64 or index.shape != (info.samples, 3):
        raise UserError(f"{path} does not hold {info.samples} rows of 3 int64, as the manifest says; {cure}")
    offsets, sizes, labels = index.T
    if offsets.min() < 0 or sizes.min() <= 0 or sizes.max() > info.bytes or (offsets > info.bytes - sizes).any():
        raise UserError(f"{path} points outside {tar}; build the dataset again")
    if labels.min() < 0 or labels.max() >= classes:
        raise UserError(f"{path} holds a label outside 0 … {classes - 1}; build the dataset again")
    return index


def verify_shard(directory: Path | str, info: ShardInfo) -> None:
    """Check a shard's size and the sha256 of its tar and its index. Raises UserError naming the file that differs."""
    for file, expected in ((info.file, info.sha256), (info.index_file, info.index_sha256)):
        path = Path(directory) / file
        try:
            if file == info.file:
                _check_size(path, path.stat().st_size, info)
            actual = sha256_file(path)
        except OSError as error:
            raise UserError(f"cannot read {path} ({error.strerror or error}); build the dataset again") from None
        if actual != expected:
            raise UserError(f"{path} was altered (its sha256 differs from the manifest); build the dataset again")


def decode(payload: bytes | memoryview, out: NDArray[np.uint8]) -> None:
    """Decode a JPEG, PNG or WebP image into `out`, a C-contiguous uint8 [H, W, C] with C = 1 or 3 (RGB; grey gives R = G = B).

    Raises ValueError with the reason when the bytes are damaged or size or mode does not fit. JPEG decoding releases
    the interpreter lock and writes into `out` without a copy.
    """
    if payload[:3] != b"\xff\xd8\xff":
        _decode_pillow(payload, out)
        return
    # The header is read first, so that a JPEG that claims 65,535 x 65,535 pixels cannot make the decoder allocate them.
    height, width, colorspace, _ = simplejpeg.decode_jpeg_header(payload)
    rows, columns, channels = out.shape
    if height != rows or width != columns or colorspace not in _COLORSPACES[channels]:
        raise ValueError(f"a JPEG of {width}x{height} {colorspace} where {_wanted(out)} is expected")
    # Arguments are passed by position, because keywords would cost 1 of the 22 microseconds of a 64x64 image.
    simplejpeg.decode_jpeg(payload, "GRAY" if channels == 1 else "RGB", False, False, 0, 0, 1, out)


def _decode_pillow(payload: bytes | memoryview, out: NDArray[np.uint8]) -> None:
    try:
        with Image.open(io.BytesIO(payload), formats=("PNG", "WEBP")) as image:
            if image.mode not in _MODES[out.shape[2]] or image.size != (out.shape[1], out.shape[0]):
                found = f"{image.width}x{image.height} {image.mode}"
                raise ValueError(f"an image of {found} where {_wanted(out)} is expected")
            # numpy repeats the one channel of a grey image if the data set has three.
            out[...] = np.asarray(image).reshape(*out.shape[:2], -1)
    # Pillow's plugins raise exceptions of many types for damaged bytes.
    except Exception as error:
        raise ValueError(str(error) or type(error).__name__) from error


def _wanted(out: NDArray[np.uint8]) -> str:
    return f"{out.shape[1]}x{out.shape[0]} {'grey' if out.shape[2] == 1 else 'RGB'}"


def _check_size(path: Path, actual: int, info: ShardInfo) -> None:
    if actual != info.bytes:
        raise UserError(f"{path} holds {actual} bytes where the manifest says {info.bytes}; build the dataset again")
