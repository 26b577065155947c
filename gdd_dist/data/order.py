"""Who sees which sample, when, and every random number: pure functions of (seed, purpose, step, slot).

Nothing here holds state, so position is a number and resume is exact and free. All noise counts with Philox-4x32-10
(Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): a slot's numbers depend on that slot alone, so a
rank draws its own slots and nothing else, and any world size draws the same global batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

_MASK = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
RUN = 16
"""Steps whose samples are looked up at once: numpy's calls cost more than what they do for one batch."""


def philox(counter: np.ndarray, key: tuple[int, int] | tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Philox-4x32-10: ``counter`` uint32 [..., 4] and a key of two 32-bit words, or uint64 [...] of such → uint32 [..., 4]."""
    c0, c1, c2, c3 = (counter[..., i].astype(np.uint64) for i in range(4))
    k0, k1 = (np.asarray(word, np.uint64) for word in key)
    for _ in range(10):
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (
            (p1 >> _SHIFT) ^ c1 ^ k0,
            p1 & _MASK,
            (p0 >> _SHIFT) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & _MASK, (k1 + np.uint64(0xBB67AE85)) & _MASK
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


@lru_cache(maxsize=1024)
def _key(seed: int, purpose: str) -> tuple[int, int]:
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def _bits(seed: int, purpose: str, step: int, slots: np.ndarray, n: int) -> np.ndarray:
    """uint32 [len(slots), n]."""
    blocks = -(-n // 4)
    found = philox(_counter(step, slots, blocks), _key(seed, purpose))
    return found.reshape(len(slots), blocks * 4)[:, :n]


def _counter(step: int, slots: np.ndarray, blocks: int) -> np.ndarray:
    """uint32 [len(slots), blocks, 4]: (block, slot, step low, step high + slot high)."""
    slots = np.asarray(slots, dtype=np.uint64)
    counter = np.empty((len(slots), blocks, 4), dtype=np.uint32)
    counter[..., 0] = np.arange(blocks, dtype=np.uint32)
    counter[..., 1] = (slots & _MASK).astype(np.uint32)[:, None]
    counter[..., 2] = step & 0xFFFFFFFF
    counter[..., 3] = ((slots >> _SHIFT) ^ np.uint64((step >> 32) << 16)).astype(np.uint32)[:, None]
    return counter


def uniform(seed: int, purpose: str, step: int, slots: np.ndarray, n: int) -> np.ndarray:
    """Uniform float32 [len(slots), n] in [0, 1), on a grid of 2^-24; row i depends on ``slots[i]``, not on the others."""
    return (_bits(seed, purpose, step, slots, n) >> np.uint32(8)).astype(np.float32) * np.float32(2**-24)


def normal(seed: int, purpose: str, step: int, slots: np.ndarray, n: int) -> np.ndarray:
    """Standard normal float32 [len(slots), n] by Box-Muller in float64; row i depends on ``slots[i]``, not on the others."""
    half = -(-n // 2)
    bits = _bits(seed, purpose, step, slots, 2 * half).astype(np.float64)
    radius = np.sqrt(-2 * np.log((bits[:, :half] + 1) * 2.0**-32))  # + 1: log(0) cannot happen
    angle = 2 * np.pi * 2.0**-32 * bits[:, half:]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)[:, :n].astype(np.float32)


def permutation(seed: int, purpose: str, step: int, n: int) -> np.ndarray:
    """A permutation of range(n), int64 [n]."""
    return permutations(seed, [purpose], step, n)[0]


def permutations(seed: int, purposes: Sequence[str], step: int, n: int) -> np.ndarray:
    """`permutation` of each purpose, int64 [len(purposes), n], for less: their keys are drawn at once."""
    keys = np.array([_key(seed, purpose) for purpose in purposes], np.uint64)
    words = philox(_counter(step, np.zeros(1), 1)[0], (keys[:, 0], keys[:, 1])).astype("<u4")
    draws = (np.random.Generator(np.random.Philox(key=four.view("<u8"))) for four in words)
    return np.stack([draw.permutation(n) for draw in draws])


def dealt(seed: int, purpose: str, positions: np.ndarray, n: int) -> np.ndarray:
    """An endless sequence over range(n), read at ``positions``: each block of ``n`` positions holds every number once.

    So ``k = position // n`` is how often the number has come before. Returns int64 [len(positions)] in [0, n).
    """
    positions = np.asarray(positions, dtype=np.int64)
    blocks = positions // n
    out = np.empty(len(positions), dtype=np.int64)
    for block in np.unique(blocks):
        here = blocks == block
        out[here] = permutation(seed, purpose, int(block), n)[positions[here] % n]
    return out


def default_streams(batch: int) -> int:
    """The largest divisor of the global batch up to 64."""
    return max(s for s in range(1, min(batch, 64) + 1) if batch % s == 0)


def balanced_rows(labels: np.ndarray, classes: int) -> np.ndarray | None:
    """Repeats samples so that every class comes equally often: int64 rows into ``labels``, ascending, or None if even.

    The j-th sample of a class with n of the largest class's m samples stands ⌊(j+1)m/n⌋ - ⌊jm/n⌋ times, so each class fills
    exactly m places, and neighbours on disk stay neighbours.
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
    """Epochs over shards, cut into canonical streams (design 5.1): batch(step, rank, world) → sample indices.

    The epoch's shards, shuffled and laid on a ring that starts anywhere, are cut into ``streams`` streams of equal length;
    inside a stream samples are shuffled within windows of ``window`` samples; a global batch takes ``batch / streams`` samples from
    each stream; rank r of w serves streams r·S/w … (r+1)·S/w - 1. Every sample comes once an epoch but for ``remainder`` of them,
    others each epoch. ``shard_samples``: samples by shard.
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
            raise ValueError(f"batch {self.batch_size} exceeds the {self.samples} samples there are")

    @cached_property
    def samples(self) -> int:
        """Samples in all shards."""
        return int(sum(self.shard_samples))

    @property
    def share(self) -> int:
        """Samples that a global batch takes from each stream."""
        return self.batch_size // self.streams

    @property
    def steps_per_epoch(self) -> int:
        """Global batches in an epoch, the same for every rank."""
        return self.samples // self.streams // self.share

    @property
    def remainder(self) -> int:
        """Samples that one epoch leaves out: fewer than batch + streams."""
        return self.samples - self.steps_per_epoch * self.batch_size

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self.shard_samples)]).astype(np.int64)

    def batch(self, step: int, rank: int = 0, world: int = 1) -> np.ndarray:
        """This rank's part of global batch ``step`` (counted over all epochs): int64 [batch_size / world], stream by stream.

        Raises ValueError where ``world`` does not divide the streams.
        """
        if self.streams % world:
            raise ValueError(f"{world} ranks do not divide {self.streams} streams")
        epoch, within = divmod(step, self.steps_per_epoch)
        run, at = divmod(within, RUN)
        found: np.ndarray = self._keep(self._draw_run, (epoch, rank, world, run), 4)
        return found[:, at * self.share : (at + 1) * self.share].flatten()  # a copy: what is kept is not the caller's

    def _draw_run(self, epoch: int, rank: int, world: int, run: int) -> np.ndarray:
        """A rank's samples in RUN steps, fewer at the epoch's end: int64 [streams / world, steps · share]."""
        mine = self.streams // world
        first, last = run * RUN, min((run + 1) * RUN, self.steps_per_epoch)
        shuffled = self._shuffled(epoch, rank * mine, mine, first * self.share, last * self.share)
        begins = np.arange(rank * mine, (rank + 1) * mine) * (self.samples // self.streams)
        return self._to_samples(epoch, begins[:, None] + shuffled)

    def _shuffled(self, epoch: int, first: int, count: int, start: int, stop: int) -> np.ndarray:
        """Places inside ``count`` streams from ``first`` on, of those from ``start`` to ``stop``: int64 [count, stop - start]."""
        parts, position = [], start
        while position < stop:
            window = position // self.window
            begin = window * self.window
            end = min(begin + self.window, stop)
            inner: np.ndarray = self._keep(self._draw_windows, (epoch, first, count, window), 2)
            parts.append(begin + inner[:, position - begin : end - begin])
            position = end
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)

    def _to_samples(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """Places on the epoch's ring → sample indices."""
        ring: tuple[np.ndarray, np.ndarray, int] = self._keep(self._draw_ring, (epoch,), 2)
        shards, ends, offset = ring
        places = (places + offset) % self.samples
        k = np.searchsorted(ends, places, side="right")
        shard = shards[k]
        sizes = self._starts[shard + 1] - self._starts[shard]
        return self._starts[shard] + places - (ends[k] - sizes)

    @cached_property
    def _recent(self) -> dict[tuple[Any, ...], Any]:
        """What the last batches were cut from. Each order has its own: to find it among others would hash a million shards."""
        return {}

    def _keep(self, draw: Callable[..., Any], of: tuple[int, ...], most: int) -> Any:
        """``draw(*of)``, kept while fewer than ``most`` of its kind came after it."""
        key = (draw.__name__, *of)
        value = self._recent.get(key)
        if value is None:
            value = self._recent[key] = draw(*of)
            alike = [k for k in list(self._recent) if k[0] == key[0]]
            for old in alike[:-most]:
                self._recent.pop(old, None)
        return value

    def _draw_windows(self, epoch: int, first: int, count: int, window: int) -> np.ndarray:
        """The shuffle of one window in each of ``count`` streams: int64 [count, size]."""
        size = min(self.window, self.samples // self.streams - window * self.window)
        purposes = [f"{self.purpose}/window/{epoch}/{stream}" for stream in range(first, first + count)]
        return permutations(self.seed, purposes, window, size)

    def _draw_ring(self, epoch: int) -> tuple[np.ndarray, np.ndarray, int]:
        """The epoch's shards in their order, the running end of each, and where the ring starts."""
        shards = permutation(self.seed, f"{self.purpose}/shards", epoch, len(self.shard_samples))
        ends = np.cumsum(np.asarray(self.shard_samples, dtype=np.int64)[shards])
        start = uniform(self.seed, f"{self.purpose}/start", epoch, np.zeros(1), 1)[0, 0]
        return shards, ends, int(float(start) * self.samples)
