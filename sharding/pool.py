"""The same function over many tasks, in worker processes or in this one.

A function gets (shared, task, tick): `shared` is sent to each worker once, `tick(n)` reports n images done.
"""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.sharedctypes import Synchronized
from typing import Any, TypeVar

from sharding.errors import UserError
from sharding.progress import Progress

Task = TypeVar("Task")
Result = TypeVar("Result")
Tick = Callable[[int], None]

POLL_S = 0.2


def available_cores() -> int:
    """Return the number of cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Pool:
    """Worker processes that live as long as the `with` block, and never longer than this process. With one worker, no process starts."""

    def __init__(self, workers: int, shared: Any) -> None:
        self._shared = shared
        self._executor: ProcessPoolExecutor | None = None
        if workers > 1:
            # Not forked, because a fork would copy the locks of the caller's threads (torch, tqdm) in their current state.
            context = multiprocessing.get_context("spawn")
            self._done: Synchronized[int] = context.Value("q", 0)
            self._stop: Synchronized[int] = context.Value("b", 0)
            of_worker = (shared, self._done, self._stop)
            self._executor = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=of_worker)

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        if self._executor is not None:
            self._stop.value = 1
            self._executor.shutdown(wait=True, cancel_futures=True)

    def map(
        self, function: Callable[[Any, Task, Tick], Result], tasks: Sequence[Task], progress: Progress
    ) -> list[Result]:
        """Return the results in the order of the tasks. Raises what the function raises, and stops the others."""
        if self._executor is None:
            return [function(self._shared, task, progress.more) for task in tasks]
        self._done.value = 0
        try:
            futures = [self._executor.submit(_run, function, task) for task in tasks]
            pending: set[Future[Result]] = set(futures)
            while pending:
                finished, pending = wait(pending, timeout=POLL_S, return_when=FIRST_COMPLETED)
                progress.update(self._done.value)
                for future in finished:
                    future.result()
            return [future.result() for future in futures]
        except BrokenProcessPool:
            raise UserError("a worker process was killed, perhaps for lack of memory; use fewer --workers") from None


class _Stopped(Exception):
    """The parent asked the workers to stop."""


# The arguments with which a worker process was started.
_shared: Any = None
_done: "Synchronized[int]"
_stop: "Synchronized[int]"


def _start_worker(shared: Any, done: "Synchronized[int]", stop: "Synchronized[int]") -> None:
    global _shared, _done, _stop
    _shared, _done, _stop = shared, done, stop
    # Ctrl-C reaches the whole process group, but only the parent handles it, and then stops the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import_webdataset_without_torch()


def import_webdataset_without_torch() -> None:
    """Import webdataset in a process that only writes shards: torch, which it imports if it can, takes 470 MB and 3 s.

    Reading with webdataset needs torch, so do not use this in a process that does anything but write.
    """
    if "torch" in sys.modules:
        return
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        import webdataset  # noqa: F401
    finally:
        del sys.modules["torch"]


def _end_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def _run(function: Callable[[Any, Any, Tick], Result], task: Any) -> Result:
    return function(_shared, task, _tick)


def _tick(images: int) -> None:
    if _stop.value:
        raise _Stopped
    with _done.get_lock():
        _done.value += images
