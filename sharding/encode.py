"""What workers do: look at images, and write one shard."""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sharding.errors import UserError
from sharding.files import atomic_file, link_atomic, sha256_file, write_atomic
from sharding.images import Seen, Target, Values, digest_of, inspect, to_stored
from sharding.links import Member
from sharding.listing import Reader
from sharding.manifest import ShardInfo
from sharding.plan import Planned, ShardPlan
from sharding.pool import Tick
from sharding.shards import decode, verify_shard
from sharding.tars import BLOCK, padded

WORK = ".build"
"""Directory in DATA for the records of shards and for temporary files, while a build is unfinished."""
OWNER, MODE = "gdd", 0o444


@dataclass(frozen=True)
class Written:
    """A finished shard, and by channel the sums of its pixels in 0 … 255 and of their squares (train only, else empty)."""

    info: ShardInfo
    sums: list[int]
    squares: list[int]


def inspect_all(
    reader: Reader, members: Sequence[Member], tick: Tick, *, values: Values | None = None
) -> list[Seen | str]:
    """Look at images; for one that cannot be read, return the reason."""
    found: list[Seen | str] = []
    for member in members:
        try:
            found.append(inspect(reader.read(member), values))
        except (OSError, ValueError) as error:
            found.append(" ".join(str(error).split()) or type(error).__name__)
        tick(1)
    return found


def write_shard(reader: Reader, shard: ShardPlan, tick: Tick, *, directory: Path, target: Target) -> Written:
    """Write a shard's tar, or a link to the tar that holds it, its index, then its record, each atomically."""
    pixels = np.empty((target.height, target.width, target.channels), np.uint8)
    sums = np.zeros((2, target.channels if shard.split == "train" else 0), np.int64)

    def samples() -> Iterator[Stored]:
        for sample in shard.samples:
            suffix, payload = _stored(reader, sample, target)
            if shard.split == "train":
                decode(payload, pixels)
                np.add(sums, moments(pixels), out=sums)
            yield Stored(sample.key, sample.label, suffix, payload)
            tick(1)

    if shard.tar is None:
        info = write_tar(directory, shard.file, samples())
    else:
        for _ in samples():  # the images are read to compute statistics, not to copy them
            pass
        link_atomic(directory / shard.file, shard.tar)
        rows = [(sample.member.offset, sample.member.size, sample.label) for sample in shard.samples]
        info = _with_index(directory, shard.file, rows)
    written = Written(info, *sums.tolist())
    write_atomic(_record(directory, shard), json.dumps(asdict(written)).encode())
    return written


@dataclass(frozen=True)
class Stored:
    """A sample as it goes into a tar: ``KEY.cls``, ``KEY.suffix``, and ``extras``, members whose names sort after those."""

    key: str
    label: int
    suffix: str
    payload: bytes
    extras: Mapping[str, bytes] = field(default_factory=dict)


def write_tar(directory: Path, file: str, samples: Iterable[Stored]) -> ShardInfo:
    """Write ``directory/file``, a WebDataset tar, and its index, each atomically; the same bytes every time."""
    # Imported here, after worker processes have made this import possible without torch; see pool.py.
    from webdataset.writer import TarWriter

    path, rows = directory / file, []
    with (
        atomic_file(path) as stream,
        TarWriter(stream, user=OWNER, group=OWNER, mode=MODE, mtime=0, encoder=False) as writer,
    ):
        for s in samples:
            writer.write({"__key__": s.key, "cls": str(s.label).encode(), s.suffix: s.payload, **s.extras})
            # Members are written in alphabetical order: the image comes after cls and before the extras.
            after = sum(BLOCK + padded(len(extra)) for extra in s.extras.values())
            rows.append((writer.tarstream.offset - after - padded(len(s.payload)), len(s.payload), s.label))
    return _with_index(directory, file, rows)


def _with_index(directory: Path, file: str, rows: Sequence[tuple[int, int, int]]) -> ShardInfo:
    """Write the index of a tar, int64 [samples, 3]: offset, size, label."""
    path, index = directory / file, (directory / file).with_suffix(".npy")
    buffer = io.BytesIO()  # numpy's own error about a full disk says less than the system's
    np.save(buffer, np.array(rows, np.int64).reshape(-1, 3))
    write_atomic(index, buffer.getvalue())
    return ShardInfo(file, len(rows), path.stat().st_size, sha256_file(path), sha256_file(index))


def _record(directory: Path, shard: ShardPlan) -> Path:
    """Return the file that says that a shard is finished."""
    return directory / WORK / f"{shard.file.replace('/', '-')}.json"


def finished_shard(directory: Path, shard: ShardPlan) -> Written | None:
    """Return a shard that an earlier run of the same build finished, or None if it did not or the files differ."""
    try:
        record = json.loads(_record(directory, shard).read_bytes())
        info = ShardInfo(**record["info"])
        verify_shard(directory, info)
    except (OSError, ValueError, KeyError, TypeError, UserError):
        return None
    return Written(info, list(record["sums"]), list(record["squares"]))


def moments(pixels: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Return the sums of the values in [H, W, C], and of their squares, by channel: int64 [2, C].

    Integers are exact, so that neither the order of the images nor the number of workers changes the sum of all.
    """
    values = pixels.reshape(-1, pixels.shape[2]).astype(np.int64)
    return np.stack([values.sum(0), np.einsum("nc,nc->c", values, values)])


def mean_and_std(sums: NDArray[np.int64], pixels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and population standard deviation per channel, in [0, 1], from the sum of `moments` over `pixels` pixels.

    The deviation of a constant channel is set to 1, because pixels are divided by it.
    """
    # Integers of any size up to the division avoid cancellation errors.
    totals = sums.T.tolist()
    variances = [(pixels * square - total**2) / (pixels * 255) ** 2 for total, square in totals]
    return tuple(total / (pixels * 255) for total, _ in totals), tuple(v**0.5 or 1.0 for v in variances)


def _stored(reader: Reader, sample: Planned, target: Target) -> tuple[str, bytes]:
    name = sample.member.name
    try:
        item = reader.read(sample.member)
    except (OSError, ValueError, zlib.error) as error:
        raise UserError(f"cannot read {name} any more ({error}); run the build again") from None
    if digest_of(item) != sample.seen.sha256:
        raise UserError(f"{name} changed while the data set was built; run the build again")
    return to_stored(item, sample.seen, target)
