"""Which rank sees which sample at which step: a pure function of (seed, epoch, step).

There is no state, so a position is just a number, and resuming is exact and needs no stored state.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from gdd_dist.data.noise import permutation, permutations, uniform

RUN = 16
"""Steps whose samples are computed together, because for one batch the overhead of numpy calls dominates."""


class Recent:
    """`permutation` with a cache of the latest results, up to ``most`` numbers in total.

    Without it, a caller that takes few numbers at a time would draw the same permutation many times. Thread-safe. Results are
    read-only, because they may be returned again.
    """

    def __init__(self, most: int) -> None:
        self._most, self._numbers, self._lock = most, 0, threading.Lock()
        self._kept: dict[tuple[int, str, int, int], np.ndarray] = {}

    def __call__(self, seed: int, purpose: str, step: int, n: int) -> np.ndarray:
        """A permutation of range(n), int64 [n]."""
        key = (seed, purpose, step, n)
        with self._lock:
            found = self._kept.pop(key, None)
            if found is None:
                found = permutation(*key)
                found.flags.writeable = False
                self._numbers += n
            self._kept[key] = found  # the dictionary is ordered by last use
            while self._numbers > self._most:
                self._numbers -= len(self._kept.pop(next(iter(self._kept))))
        return found


def dealt(
    seed: int,
    purpose: str,
    positions: np.ndarray,
    n: int,
    draw: Callable[[int, str, int, int], np.ndarray] = permutation,
) -> np.ndarray:
    """Return an endless sequence over range(n) at ``positions``: each block of ``n`` positions has every number once.

    So ``k = position // n`` is how often the number occurred before. Returns int64 [len(positions)] in [0, n). ``draw``:
    `permutation`, or a `Recent`.
    """
    positions = np.asarray(positions, dtype=np.int64)
    blocks = positions // n
    out = np.empty(len(positions), dtype=np.int64)
    for block in np.unique(blocks):
        here = blocks == block
        out[here] = draw(seed, purpose, int(block), n)[positions[here] % n]
    return out


def default_streams(batch: int) -> int:
    """Return the largest divisor of the global batch up to 64."""
    return max(s for s in range(1, min(batch, 64) + 1) if batch % s == 0)


def balanced_rows(labels: np.ndarray, classes: int) -> np.ndarray | None:
    """Repeat samples so that all classes are equally frequent: int64 rows of ``labels``, ascending; None if they already are.

    If a class has n samples and the largest class m, its j-th sample is repeated ⌊(j+1)m/n⌋ - ⌊jm/n⌋ times, so each class has
    exactly m rows, and neighbours on disk stay neighbours.
    """
    counts = np.bincount(labels, minlength=classes)
    present = counts[counts > 0]
    if len(present) == 0 or (present == present[0]).all():
        return None
    most = counts.max()
    copies = np.zeros(len(labels), dtype=np.int64)
    for c in np.flatnonzero(counts):
        rows = np.flatnonzero(labels == c)
        edges = np.arange(len(rows) + 1) * most // len(rows)
        copies[rows] = np.diff(edges)
    return np.repeat(np.arange(len(labels)), copies)


@dataclass(frozen=True)
class Order:
    """Epochs over shards, divided into streams that do not depend on the ranks: batch(step, rank, world) → sample indices.

    The shuffled shards of an epoch form a ring with a random start, which is divided into ``streams`` streams of equal length.
    In a stream, samples are shuffled within windows of ``window`` samples. A global batch takes ``batch / streams`` samples from
    each stream, one stream after another; rank r of w gets the r-th of w equal parts. Every sample occurs once per epoch, except
    fewer than batch + streams, which differ between epochs. ``shard_samples``: number of samples of each shard.
    """

    shard_samples: tuple[int, ...]
    batch_size: int
    streams: int
    seed: int
    purpose: str = "order"
    window: int = 16384

    def __post_init__(self) -> None:
        if self.batch_size % self.streams:
            raise ValueError(f"batch {self.batch_size} is not a multiple of {self.streams} streams")
        if self.steps_per_epoch < 1:
            raise ValueError(f"batch {self.batch_size} exceeds the {self.samples} samples of the split")

    @cached_property
    def samples(self) -> int:
        """Number of samples in all shards."""
        return int(sum(self.shard_samples))

    @property
    def share(self) -> int:
        """Number of samples that a global batch takes from each stream."""
        return self.batch_size // self.streams

    @property
    def steps_per_epoch(self) -> int:
        """Number of global batches in an epoch, the same for every rank."""
        return self.samples // self.streams // self.share

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self.shard_samples)]).astype(np.int64)

    def batch(self, step: int, rank: int = 0, world: int = 1) -> np.ndarray:
        """Return this rank's part of global batch ``step`` (counted over all epochs): int64 [batch_size / world], by stream.

        Raises ValueError if ``world`` does not divide the batch.
        """
        if self.batch_size % world:
            raise ValueError(f"{world} ranks do not divide a batch of {self.batch_size}")
        epoch, within = divmod(step, self.steps_per_epoch)
        run, at = divmod(within, RUN)
        slots = self.batch_size // world
        first, before = divmod(rank * slots, self.share)
        streams = -(-(before + slots) // self.share)
        found: np.ndarray = self._keep(self._draw_run, (epoch, first, streams, run), 4)
        whole = found[:, at * self.share : (at + 1) * self.share].flatten()  # a copy; the original is cached
        return whole[before : before + slots]

    def _draw_run(self, epoch: int, stream: int, count: int, run: int) -> np.ndarray:
        """Return the samples of ``count`` streams from ``stream`` on, for RUN steps or up to the epoch's end: int64 [count, steps · share]."""
        first, last = run * RUN, min((run + 1) * RUN, self.steps_per_epoch)
        shuffled = self._shuffled(epoch, stream, count, first * self.share, last * self.share)
        begins = np.arange(stream, stream + count) * (self.samples // self.streams)
        return self._to_samples(epoch, begins[:, None] + shuffled)

    def _shuffled(self, epoch: int, first: int, count: int, start: int, stop: int) -> np.ndarray:
        """Return the shuffled positions ``start`` to ``stop`` of ``count`` streams from ``first`` on: int64 [count, stop - start]."""
        parts = []
        for window in range(start // self.window, -(-stop // self.window)):
            begin = window * self.window
            inner: np.ndarray = self._keep(self._draw_windows, (epoch, first, count, window), 2)
            parts.append(begin + inner[:, max(0, start - begin) : stop - begin])
        return np.concatenate(parts, axis=1)

    def _to_samples(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """Convert positions on the epoch's ring to sample indices."""
        ring: tuple[np.ndarray, np.ndarray, int] = self._keep(self._draw_ring, (epoch,), 2)
        shards, ends, offset = ring
        places = (places + offset) % self.samples
        k = np.searchsorted(ends, places, side="right")
        shard = shards[k]
        sizes = self._starts[shard + 1] - self._starts[shard]
        return self._starts[shard] + places - (ends[k] - sizes)

    @cached_property
    def _recent(self) -> dict[tuple[Any, ...], Any]:
        """The arrays from which the last batches were taken. Each order has its own cache, because a shared cache would have to hash
        orders, which may have a million shards."""
        return {}

    def _keep(self, draw: Callable[..., Any], of: tuple[int, ...], most: int) -> Any:
        """Return ``draw(*of)``, cached until ``most`` newer results of its kind exist."""
        key = (draw.__name__, *of)
        value = self._recent.get(key)
        if value is None:
            value = self._recent[key] = draw(*of)
            alike = [k for k in list(self._recent) if k[0] == key[0]]
            for old in alike[:-most]:
                self._recent.pop(old, None)
        return value

    def _draw_windows(self, epoch: int, first: int, count: int, window: int) -> np.ndarray:
        """Return the shuffle of one window in each of ``count`` streams: int64 [count, size]."""
        size = min(self.window, self.samples // self.streams - window * self.window)
        purposes = [f"{self.purpose}/window/{epoch}/{stream}" for stream in range(first, first + count)]
        return permutations(self.seed, purposes, window, size)

    def _draw_ring(self, epoch: int) -> tuple[np.ndarray, np.ndarray, int]:
        """Return the epoch's shards in order, the cumulative end of each, and the start of the ring."""
        shards = permutation(self.seed, f"{self.purpose}/shards", epoch, len(self.shard_samples))
        ends = np.cumsum(np.asarray(self.shard_samples, dtype=np.int64)[shards])
        start = uniform(self.seed, f"{self.purpose}/start", epoch, np.zeros(1), 1)[0, 0]
        return shards, ends, int(float(start) * self.samples)
