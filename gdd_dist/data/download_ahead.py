"""Which shards of a remote data set are downloaded ahead: those of the next batches, in order of use."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np

from sharding.manifest import ShardInfo

Batch = Callable[[int], np.ndarray]
"""Step → the sample numbers that it reads, int64."""


class Ahead:
    """A thread that requests the shards of the next batches, in the order in which they are used.

    Shards that are requested but not yet read take at most ``room`` bytes, or are one shard. The next shard is requested
    when the reader has finished one.
    """

    def __init__(
        self, download: Callable[[ShardInfo], None], room: int, shards: Sequence[ShardInfo], batch: Batch, steps: range
    ) -> None:
        """``download`` starts a download and returns at once. ``batch(step)`` must be a pure function."""
        self._download, self._room, self._shards = download, room, shards
        self._ends = np.cumsum([info.samples for info in shards])
        self._step, self._closed, self._news = steps.start, False, threading.Condition()
        self._thread = threading.Thread(target=self._follow, args=(batch, steps), name="ahead", daemon=True)
        self._thread.start()

    def advance(self) -> None:
        """Record that the reader has read one more batch."""
        with self._news:
            self._step += 1
            self._news.notify()

    def close(self) -> None:
        """Stop requesting shards, because other batches will be read than expected."""
        with self._news:
            self._closed = True
            self._news.notify()
        self._thread.join()

    def _follow(self, batch: Batch, steps: range) -> None:
        # Shard → the last known step that needs it, in the order of these steps.
        last = dict[int, int]()
        for step in steps:
            for shard in dict.fromkeys(np.searchsorted(self._ends, batch(step), side="right").tolist()):
                known = last.pop(shard, None) is not None
                last[shard] = step
                if known:
                    continue
                if not self._has_room(last):
                    return
                self._download(self._shards[shard])
            if self._closed or len(last) == len(self._shards):
                return

    def _has_room(self, last: dict[int, int]) -> bool:
        """Wait until the reader has finished so many shards that the others fit; return False after `close`."""
        while len(last) > 1 and sum(self._shards[shard].bytes for shard in last) > self._room:
            oldest, step = next(iter(last.items()))
            with self._news:
                while not self._closed and self._step <= step:
                    self._news.wait()
                if self._closed:
                    return False
            del last[oldest]
        return True
