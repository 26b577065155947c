"""Reads the cache of teacher logits: memory maps, in which a sample is found by (shard, row)."""

import io
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from gdd_dist.storage.json_files import again
from sharding.errors import UserError

MEANS = "class-means.npy"


def logit_file(directory: Path, teacher: int, shard: int) -> Path:
    """Return the path of one teacher's logits for one shard of train: float16 [V, n, C], rows in index order."""
    return directory / f"teacher-{teacher:03d}" / f"train-{shard:06d}.npy"


def _damaged(path: Path, why: Exception, directory: Path) -> UserError:
    return UserError(f"{path} is damaged ({why}); {again(directory / MEANS)}")


class LogitCache:
    """A finished logits step, memory-mapped: ``take(teacher, samples, views)``, ``class_means``, and the number of ``views`` V."""

    def __init__(self, directory: Path, shard_samples: Sequence[int]) -> None:
        self._starts = np.concatenate([[0], np.cumsum(shard_samples)])
        self._directory, self._counts = directory, tuple(shard_samples)
        # Each memory map needs a file descriptor, and there may be more files than a process may have descriptors.
        self._file = lru_cache(maxsize=256)(self._open_file)
        try:
            self.class_means: np.ndarray = np.load(directory / MEANS, mmap_mode="r", allow_pickle=False)
            """float32 [T, V, classes, C]: mean logits of each class's training images."""
        except (OSError, ValueError, EOFError) as e:
            raise _damaged(directory / MEANS, e, directory) from e
        self.views = int(self.class_means.shape[1])

    def _open_file(self, teacher: int, shard: int) -> np.ndarray:
        """Map the file of a teacher and shard: float16 [V, n, C].

        Threads that read ahead call this at once. `np.load` parses a header as Python source, which CPython 3.11 cannot do in two threads at a
        time (python/cpython#106905), so the header's bytes are compared instead.
        """
        path = logit_file(self._directory, teacher, shard)
        shape = (self.views, self._counts[shard], self.class_means.shape[-1])
        expected = io.BytesIO()
        np.lib.format.write_array_header_1_0(expected, {"descr": "<f2", "fortran_order": False, "shape": shape})
        header = expected.getvalue()
        try:
            with path.open("rb") as f:
                found = f.read(len(header))
            if found != header:
                raise ValueError(f"it does not hold float16 {shape}")
            return np.memmap(path, "<f2", "r", offset=len(header), shape=shape)
        except (OSError, ValueError) as e:
            raise _damaged(path, e, self._directory) from e

    def take(self, teacher: int, samples: np.ndarray, views: np.ndarray) -> np.ndarray:
        """Return one teacher's logits, float32 [n, C], for pairs of sample number and view, both int64 [n]."""
        shards = np.searchsorted(self._starts, samples, side="right") - 1
        rows = samples - self._starts[shards]
        out = np.empty((len(samples), self.class_means.shape[-1]), dtype=np.float32)
        for shard in np.unique(shards):
            here = shards == shard
            out[here] = self._file(teacher, int(shard))[views[here], rows[here]]
        return out


NPY_HEADER = 128


def file_bytes(samples: int, views: int, classes: int) -> int:
    """Return the bytes of one logit file, with its header."""
    return 2 * views * samples * classes + NPY_HEADER
