"""Checks a data set on disk against its manifest."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sharding.encode import mean_and_std, moments
from sharding.errors import UserError
from sharding.foreign import TarSet, samples
from sharding.manifest import Manifest, ShardInfo
from sharding.pool import Pool, Tick, available_cores
from sharding.progress import Log, Progress
from sharding.shards import decode, read_index, verify_shard

IMAGES_PER_WORKER = 2000
# Decoders of other versions may round differently.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Found:
    """What checking a shard found: its faults, class counts, and the sum of the images' `moments`."""

    faults: tuple[str, ...]
    class_counts: tuple[int, ...]
    sums: NDArray[np.int64]


def verify(directory: Path | str, *, deep: bool = False, log: Log, bar: bool = False) -> Manifest:
    """Check sizes and sha256 of all files; `deep` decodes every image and checks labels, counts and statistics too.

    Returns the manifest. Raises UserError naming the first fault, and how many more there are.
    """
    directory = Path(directory)
    manifest = Manifest.load(directory)
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    faults = list[str]()
    with (
        ThreadPoolExecutor(available_cores()) as threads,
        Progress("hashing", len(shards), log=log, bar=bar, unit="shards") as progress,
    ):
        for fault in threads.map(lambda shard: _fault(directory, shard), shards):
            faults += [fault] if fault else []
            progress.more(1)
    faults += _strays(directory, shards)
    if deep and not faults:
        faults = _deep(directory, manifest, log, bar)
    if faults:
        more = f" ({len(faults) - 1} more faults)" if len(faults) > 1 else ""
        raise UserError(f"{faults[0]}{more}")
    return manifest


def _fault(directory: Path, shard: ShardInfo) -> str | None:
    try:
        verify_shard(directory, shard)
    except UserError as error:
        return str(error)
    return None


def _strays(directory: Path, shards: list[ShardInfo]) -> Iterator[str]:
    """Report shards that are not in the manifest, because programs that read every file of a directory would use them."""
    known = {name for shard in shards for name in (shard.file, shard.index_file)}
    for path in sorted([*directory.glob("*/*.tar"), *directory.glob("*/*.npy")]):
        if f"{path.parent.name}/{path.name}" not in known:
            yield f"{path} is not in the manifest; remove it"


def _deep(directory: Path, manifest: Manifest, log: Log, bar: bool) -> list[str]:
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    images = sum(split.samples for split in manifest.splits.values())
    workers = min(available_cores(), len(shards), -(-images // IMAGES_PER_WORKER))
    with Pool(workers, (directory, manifest)) as pool, Progress("verifying", images, log=log, bar=bar) as progress:
        found = dict(zip(shards, pool.map(check_shard, shards, progress), strict=True))
    faults = [fault for one in found.values() for fault in one.faults]
    for name, split in manifest.splits.items():
        counts = np.sum([found[shard].class_counts for shard in split.shards], axis=0)
        if tuple(counts.tolist()) != split.class_counts:
            faults.append(f"the class counts of {name} differ from the manifest; build the dataset again")
    train = [found[shard] for shard in manifest.splits["train"].shards]
    pixels = manifest.splits["train"].samples * manifest.height * manifest.width
    statistics = mean_and_std(np.sum([f.sums for f in train], axis=0), pixels)
    if not np.allclose(statistics, (manifest.mean, manifest.std), rtol=0, atol=TOLERANCE):
        faults.append("mean or std of train differs from the manifest; build the dataset again")
    return faults


def check_shard(shared: tuple[Path, Manifest], info: ShardInfo, tick: Tick) -> Found:
    """Decode every image of a shard and compare the tar with its index."""
    directory, manifest = shared
    path, classes = directory / info.file, len(manifest.classes)
    sums = np.zeros((2, manifest.channels), np.int64)
    try:
        index = read_index(directory, info, classes)
        members = [(s.member.offset, s.member.size, s.label) for s in samples(path, 0, TarSet([path]))]
    except (UserError, ValueError) as error:
        return Found((f"{path}: {error}",), (0,) * classes, sums)
    counts = tuple(np.bincount(index[:, 2], minlength=classes).tolist())
    if _rows_of(index, np.array(members, np.int64)):
        faults = tuple(_decode_all(path, index, manifest, sums, tick))
    else:
        faults = (f"{info.index_file} does not match {path}; build the dataset again",)
    return Found(faults, counts, sums)


def _rows_of(index: NDArray[np.int64], members: NDArray[np.int64]) -> bool:
    """Whether each row of the index is a sample of the tar, in its order; a linked tar may also hold other splits."""
    places = np.searchsorted(members[:, 0], index[:, 0])
    known = bool((places < len(members)).all()) and np.array_equal(members[places], index)
    return known and bool((np.diff(places) > 0).all())


def _decode_all(
    path: Path, index: NDArray[np.int64], manifest: Manifest, sums: NDArray[np.int64], tick: Tick
) -> Iterator[str]:
    pixels = np.empty((manifest.height, manifest.width, manifest.channels), np.uint8)
    with path.open("rb") as stream:
        for row, (offset, size, _) in enumerate(index.tolist()):
            stream.seek(offset)
            try:
                decode(stream.read(size), pixels)
                sums += moments(pixels)
            except ValueError as error:
                yield f"{path}, row {row}: {error}; build the dataset again"
            tick(1)
