"""Batches: the memory into which they are read, the threads that fill it, and reading ahead."""

import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from functools import partial
from itertools import islice
from threading import Lock
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

Batch = TypeVar("Batch")
Task = TypeVar("Task")

PREFETCH_BYTES = 256 * 2**20
"""Most memory for batches read ahead; one batch is always read ahead."""
READERS = 2
"""Number of batches read at a time, each by a part of the decoding threads. This is faster than all threads on one batch,
because threads wait less for each other and for the interpreter."""
FEW = 32
"""For so few images, waking other threads takes longer than decoding."""


class Workers:
    """Decodes on ``threads`` threads: the callers' threads, and helper threads that are divided between the callers."""

    def __init__(self, threads: int) -> None:
        self._threads, self._callers, self._working = threads, 0, 0
        self._counting = Lock()
        self._alone = Lock() if threads == 1 else nullcontext()
        self._pool = ThreadPoolExecutor(max(1, threads - 1), thread_name_prefix="decode")

    def share(self, work: Callable[[Iterator[Task]], None], tasks: list[Task]) -> None:
        """Run ``work(tasks)`` on this thread and its helpers; each takes the next free task, one at a time.

        Raises what ``work`` raises, after all threads have stopped working on these tasks.
        """
        # A shared list iterator gives each task to one thread, so a slow thread does not delay the others.
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
    """Memory for batches, reused after the last view of it is freed."""

    def __init__(self) -> None:
        self._free: deque[np.ndarray] = deque(maxlen=8)

    def take(self, shape: tuple[int, ...]) -> tuple[Tensor, np.ndarray]:
        """Return uninitialized uint8 [shape], as a tensor and as an array over the same bytes."""
        size = int(np.prod(shape))
        memory = None
        while self._free and (memory is None or len(memory) < size):
            memory = self._free.popleft()  # if it is too small, because batches grew, it is freed
        if memory is None or len(memory) < size:
            memory = np.empty(size, dtype=np.uint8)
        out = memory[:size].reshape(shape)
        weakref.finalize(out, self._free.append, memory)  # the tensor and all its views keep ``out`` alive
        return torch.from_numpy(out), out


class PinnedBuffers:
    """Page-locked memory for batches; torch reuses it after copies from it are complete."""

    def take(self, shape: tuple[int, ...]) -> tuple[Tensor, np.ndarray]:
        """Like Buffers.take."""
        batch = torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        return batch, batch.numpy()


def prefetch(
    read: Callable[[int], Batch], start: int, stop: int, ahead: int, limit: int = PREFETCH_BYTES
) -> Iterator[Batch]:
    """Yield ``read(step)`` for each step from ``start`` to ``stop``, read ahead by threads, up to READERS at a time.

    At most ``ahead`` batches and at most ``limit`` bytes are read ahead, but at least one batch.
    """
    pool = ThreadPoolExecutor(READERS, thread_name_prefix="prefetch", initializer=_on_the_callers_device())
    try:
        reads = (pool.submit(read, step) for step in range(start, stop))
        waiting: deque[Future[Batch]] = deque()
        most = 1
        for _ in range(start, stop):
            waiting.extend(islice(reads, max(0, most - len(waiting))))
            batch = waiting.popleft().result()
            size = sum(leaf.nbytes for leaf in tree_leaves(batch) if isinstance(leaf, (Tensor, np.ndarray)))
            most = 1 + max(1, min(ahead, limit // max(1, size)))
            waiting.extend(islice(reads, max(0, most - 1 - len(waiting))))
            yield batch
    finally:
        pool.shutdown(cancel_futures=True)


def _on_the_callers_device() -> Callable[[], None]:
    """Return an initializer of threads: without it, a new thread would use GPU 0 and create a context there."""
    if not torch.cuda.is_initialized():
        return lambda: None
    return partial(torch.cuda.set_device, torch.cuda.current_device())
