"""Which shards of a remote data set are downloaded ahead: those of the batches to come, the soonest needed first."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np

from sharding.manifest import ShardInfo

Batch = Callable[[int], np.ndarray]
"""Step → the samples that it reads, int64."""


class Ahead:
    """A thread that looks at the batches to come and asks for the download of their shards, in the order in which they are used.

    The shards asked for and not yet read take ``room`` bytes at most, or are one shard. A shard that the reader has finished
    makes room for the next.
    """

    def __init__(
        self, download: Callable[[ShardInfo], None], room: int, shards: Sequence[ShardInfo], batch: Batch, steps: range
    ) -> None:
        """``download``: begins to, and returns. ``batch(step)`` must be a pure function."""
        self._download, self._room, self._shards = download, room, shards
        self._ends = np.cumsum([info.samples for info in shards])
        self._step, self._closed, self._news = steps.start, False, threading.Condition()
        self._thread = threading.Thread(target=self._follow, args=(batch, steps), name="ahead", daemon=True)
        self._thread.start()

    def advance(self) -> None:
        """The reader has read a batch more."""
        with self._news:
            self._step += 1
            self._news.notify()

    def close(self) -> None:
        """Ask for no more: other batches will come than was thought."""
        with self._news:
            self._closed = True
            self._news.notify()
        self._thread.join()

    def _follow(self, batch: Batch, steps: range) -> None:
        # Shard → the last step that needs it as far as was looked, in the order of these steps.
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
        """Wait until the reader has left enough shards behind that the others fit; False where that is of no use any more."""
        while len(last) > 1 and sum(self._shards[shard].bytes for shard in last) > self._room:
            oldest, step = next(iter(last.items()))
            with self._news:
                while not self._closed and self._step <= step:
                    self._news.wait()
                if self._closed:
                    return False
            del last[oldest]
        return True
