"""Batches: the memory they are read into, the threads that fill it, and reading ahead of the steps that use them."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from functools import partial
from threading import Lock
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

Batch = TypeVar("Batch")
Task = TypeVar("Task")

PREFETCH_BYTES = 256 * 2**20
"""Batches read ahead take no more memory than this, but for one, which is always read ahead."""
READERS = 2
"""Batches that are read at a time, each by its part of the decoding threads. That is faster than all threads on one batch after
another, because they then wait less for each other and for the interpreter."""
FEW = 32
"""For so few images it takes longer to wake other threads than to decode them."""


class Workers:
    """Decodes on ``threads`` threads: the threads that ask for batches, and helpers. The helpers are shared out between those that ask."""

    def __init__(self, threads: int) -> None:
        self._threads, self._callers, self._working = threads, 0, 0
        self._counting = Lock()
        self._alone = Lock() if threads == 1 else nullcontext()
        self._pool = ThreadPoolExecutor(max(1, threads - 1), thread_name_prefix="decode")

    def share(self, work: Callable[[Iterator[Task]], None], tasks: list[Task]) -> None:
        """``work(tasks)`` on this thread and its helpers, of which each takes what no other has taken, one by one.

        Raises what ``work`` raises, when no thread works on these tasks any more.
        """
        # A list's iterator gives each task to one thread; one that the system delays holds up no other.
        left = iter(tasks)
        with self._counting:
            self._callers += 1
            fair = -(-self._threads // self._callers) - 1
            helpers = max(0, min(fair, self._threads - self._working - 1)) if len(tasks) > FEW else 0
            self._working += 1 + helpers
        turns = [self._pool.submit(self._turn, work, left) for _ in range(helpers)]
        try:
            with self._alone:
                self._turn(work, left)
        finally:
            with self._counting:
                self._callers -= 1
            wait(turns)
        for turn in turns:
            turn.result()

    def _turn(self, work: Callable[[Iterator[Task]], None], left: Iterator[Task]) -> None:
        try:
            work(left)
        finally:
            with self._counting:
                self._working -= 1


class Buffers:
    """Memory for batches, handed out again once the last view of it is gone."""

    def __init__(self) -> None:
        self._free: deque[np.ndarray] = deque(maxlen=8)

    def take(self, shape: tuple[int, ...]) -> tuple[Tensor, np.ndarray]:
        """uint8 [shape], its content undefined, as a tensor and as an array over the same bytes."""
        size = int(np.prod(shape))
        memory = None
        while self._free and (memory is None or len(memory) < size):
            memory = self._free.popleft()  # too small: batches grew, so let it go
        if memory is None or len(memory) < size:
            memory = np.empty(size, dtype=np.uint8)
        out = memory[:size].reshape(shape)
        weakref.finalize(out, self._free.append, memory)  # the tensor, and every view of it, holds ``out``
        return torch.from_numpy(out), out


class PinnedBuffers:
    """Page-locked memory for batches; torch hands it out again once copies from it are done."""

    def take(self, shape: tuple[int, ...]) -> tuple[Tensor, np.ndarray]:
        """As Buffers.take."""
        batch = torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        return batch, batch.numpy()


def prefetch(
    read: Callable[[int], Batch], start: int, stop: int, ahead: int, limit: int = PREFETCH_BYTES
) -> Iterator[Batch]:
    """``read(step)`` for each step from ``start`` to ``stop``, some of them computed beforehand, up to READERS at a time.

    Up to ``ahead`` batches, and of these as many as ``limit`` bytes hold, but at least one.
    """
    pool = ThreadPoolExecutor(READERS, thread_name_prefix="prefetch", initializer=_on_the_callers_device())
    try:
        waiting: deque[Future[Batch]] = deque()
        most, submitted = 1, start
        for step in range(start, stop):
            while submitted < min(step + most, stop):
                waiting.append(pool.submit(read, submitted))
                submitted += 1
            batch = waiting.popleft().result()
            most = 1 + max(1, min(ahead, limit // max(1, _bytes(batch))))
            while submitted < min(step + most, stop):
                waiting.append(pool.submit(read, submitted))
                submitted += 1
            yield batch
    finally:
        pool.shutdown(cancel_futures=True)


def _on_the_callers_device() -> Callable[[], None]:
    """What a thread calls first. A new thread is on GPU 0, and would open a context there, whichever GPU this rank has."""
    if not torch.cuda.is_initialized():
        return lambda: None
    return partial(torch.cuda.set_device, torch.cuda.current_device())


def _bytes(batch: Any) -> int:
    """Memory of the arrays and tensors of a batch."""
    if isinstance(batch, (Tensor, np.ndarray)):
        return int(batch.nbytes)
    return sum(_bytes(part) for part in batch) if isinstance(batch, (tuple, list)) else 0
