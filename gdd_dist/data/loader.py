"""Images of a split by sample number: memory map, index, decoding threads, one reused uint8 batch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from gdd_dist.data.pixels import to_float as to_float
from gdd_dist.data.pixels import to_uint8 as to_uint8
from sharding.errors import UserError
from sharding.manifest import Manifest
from sharding.shards import Shards, decode

Batch = TypeVar("Batch")


class Images:
    """Random access to a split: ``read(indices)`` → uint8 [B, C, H, W]. Safe to use from several threads.

    ``resident``: "ram" keeps each image once it is decoded, "none" never does, "auto" does when all of them take at most
    ``budget`` bytes.
    """

    def __init__(
        self,
        data: Path,
        manifest: Manifest,
        split: str,
        *,
        threads: int = 1,
        resident: str = "auto",
        budget: int | None = None,
    ) -> None:
        self.shards = Shards(data, manifest, split)
        self._files = [data / info.file for info in manifest.splits[split].shards]
        self.labels = self.shards.labels
        self.shape = (manifest.height, manifest.width, manifest.channels)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode") if threads > 1 else None
        self._threads = threads
        size = int(np.prod(self.shape)) * self.shards.samples
        keep = resident == "ram" or (resident == "auto" and size <= (free_memory() // 8 if budget is None else budget))
        self._kept = np.empty((self.shards.samples, *self.shape), dtype=np.uint8) if keep else None
        self._have = np.zeros(self.shards.samples, dtype=bool)

    def __len__(self) -> int:
        return self.shards.samples

    @property
    def resident_bytes(self) -> int:
        """Memory of the kept images once all have been read; 0 where none are kept."""
        return 0 if self._kept is None else self._kept.nbytes

    def read(self, indices: np.ndarray, out: np.ndarray | None = None) -> Tensor:
        """Images by sample number, as a uint8 view [B, C, H, W] of ``out`` (uint8 [B, H, W, C]; fresh by default).

        Raises UserError that names the shard of an image that does not decode to the manifest's size.
        """
        indices = np.asarray(indices, dtype=np.int64)
        if out is None:
            out = np.empty((len(indices), *self.shape), dtype=np.uint8)
        if self._kept is None:
            self._decode_all(indices, out, np.arange(len(indices)))
        else:
            missing = np.unique(indices[~self._have[indices]])
            if len(missing):
                self._decode_all(missing, self._kept, missing)
                self._have[missing] = True
            np.take(self._kept, indices, axis=0, out=out)
        return torch.from_numpy(out).permute(0, 3, 1, 2)

    def _decode_all(self, indices: np.ndarray, out: np.ndarray, places: np.ndarray) -> None:
        """Decode each of ``indices`` into ``out[place]``."""
        if self._pool is None or len(indices) < 2 * self._threads:
            self._decode_some(indices, out, places)
            return
        parts = np.array_split(np.arange(len(indices)), self._threads)
        for future in [self._pool.submit(self._decode_some, indices[p], out, places[p]) for p in parts]:
            future.result()

    def _decode_some(self, indices: np.ndarray, out: np.ndarray, places: np.ndarray) -> None:
        for i, place in zip(indices.tolist(), places.tolist(), strict=True):
            try:
                decode(self.shards.payload(i), out[place])
            except ValueError as e:
                shard, row = self.shards.locate(i)
                raise UserError(
                    f"{self._files[shard]}, row {row}: {e}; rebuild the data set with python -m sharding build"
                ) from e


def free_memory() -> int:
    """Bytes of memory that this host can still give, divided by the ranks that share it."""
    pages = os.sysconf("SC_AVPHYS_PAGES") if hasattr(os, "sysconf") else 0
    return int(pages * os.sysconf("SC_PAGE_SIZE")) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def prefetch(read: Callable[[int], Batch], start: int, stop: int, ahead: int) -> Iterator[Batch]:
    """``read(step)`` for each step from ``start`` to ``stop``, up to ``ahead`` of them computed beforehand on one thread."""
    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as pool:
        waiting: list[Future[Batch]] = [pool.submit(read, s) for s in range(start, min(start + ahead, stop))]
        for step in range(start, stop):
            if step + ahead < stop:
                waiting.append(pool.submit(read, step + ahead))
            yield waiting.pop(0).result()
