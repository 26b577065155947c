"""Signals to this process: asked to stop (SIGTERM, SIGUSR1: preemption), interrupted (SIGINT), its torchrun gone.

A handler of Python waits while the main thread is inside a collective, and torchrun kills after 30 s: so a thread listens.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

GRACE = 15.0
"""Seconds that ranks have to agree to stop; launchers must give the job more (torchrun, SLURM, Kubernetes: 30 s)."""
LONGEST_GRACE = 25.0
_LATE_SIGNAL = "at once, on another signal after the time to agree; the last checkpoint is whole"


class Preempted(Exception):
    """This job was asked to stop; what it had done is saved."""


class PeerError(Exception):
    """Another rank failed; its own message says why."""


class Asked:
    """Whether this job was asked to stop. ``number``: the signal, 0 while none came; ``heard``: set when one did.

    ``patient``: there is something to save, so that a signal does not end this process at once. ``ranks``: of the job.
    """

    def __init__(self) -> None:
        self.number, self.agreed, self.grace, self.patient, self.ranks = 0, False, GRACE, False, 1
        self.heard = threading.Event()
        self.wake: Callable[[], object] = lambda: None

    def note(self, number: int) -> None:
        """A signal came, here or to another rank."""
        self.number = self.number or number
        self.heard.set()
        self.wake()

    def allow(self, seconds: float) -> None:
        """Ranks that take a step together get twice as long as it took to agree, before they are asked to stop."""
        if not self.number:
            self.grace = max(self.grace, min(2 * seconds, LONGEST_GRACE))

    @property
    def name(self) -> str:
        """SIGTERM, SIGUSR1."""
        return signal.Signals(self.number).name if self.number else "nobody"

    @property
    def status(self) -> int:
        """The exit status of a process that a signal ended."""
        return 128 + self.number


asked = Asked()
_at_end: list[Callable[[], None]] = []


def at_end(action: Callable[[], None]) -> None:
    """Call ``action`` before this process leaves through `end_with`; it has two seconds."""
    _at_end.append(action)


def end_with(status: int, line: str = "") -> NoReturn:
    """Say ``line`` and leave at once, from any thread: no interpreter teardown in which gloo's threads could abort."""
    if line:
        with suppress(OSError):
            os.write(2, f"{line}\n".encode(errors="backslashreplace"))
    last = threading.Thread(target=_clean, daemon=True)
    last.start()
    last.join(2.0)  # a file system that hangs, or a pipe that nobody reads, must not keep us
    os._exit(status)


def _clean() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody reads it any more; run_program has said so where it matters
            stream.flush()
    for action in _at_end:
        action()


def listen(rank: str) -> None:
    """From now on the signals are heard, and this rank ends with its torchrun. Call it once, from the main thread."""
    told, tell = os.pipe()
    os.set_blocking(tell, False)
    threading.Thread(target=_hear, args=(told, rank), daemon=True, name="signals").start()
    signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
    asked.wake = lambda: os.write(tell, b"\0")
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _handler)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _end_with_parent()


def _handler(_number: int, _frame: object) -> None:
    """Nothing: the thread that listens acts on the signal. Python only needs a handler to be there."""


def _hear(told: int, rank: str) -> None:
    """Note the first signal; leave when the ranks do not agree to stop in time.

    What comes within that time is the same preemption: launchers repeat a signal, pass it on, and send it to every rank.
    """
    deadline, interrupted, late = float("inf"), False, False
    while True:
        wait = None if deadline == float("inf") else max(0.0, deadline - time.monotonic())
        if not select.select([told], [], [], wait)[0]:
            if interrupted:
                end_with(130, f"stopped: rank {rank}, interrupted; the same command goes on from the last checkpoint")
            if not asked.agreed:
                what = "the ranks did not agree" if asked.ranks > 1 else "no step ended"
                why = f"asked to by {asked.name}, without saving: {what} within {asked.grace:.0f} s"
                end_with(asked.status, f"stopped: rank {rank}, {why}; the last checkpoint is whole")
            deadline, late = float("inf"), True
            continue
        number = os.read(told, 1)[0]
        if number == 0 and deadline == float("inf") and not late:  # another rank was asked
            deadline = time.monotonic() + asked.grace
        elif number == signal.SIGINT:  # the main thread hears it too, unless it is inside a collective
            interrupted, deadline = True, time.monotonic() + 2.0
        elif number in (signal.SIGTERM, signal.SIGUSR1) and signal.getsignal(number) is _handler:
            if not asked.patient:
                end_with(128 + number, f"stopped: rank {rank}, by {signal.Signals(number).name}; nothing had begun")
            if late:
                end_with(128 + number, f"stopped: rank {rank}, {_LATE_SIGNAL}")
            if not asked.number:
                deadline = time.monotonic() + asked.grace
                asked.note(number)


def _end_with_parent() -> None:
    """torchrun starts each rank in a session of its own, so killing its process group does not reach the ranks."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() == 1:
            end_with(143)
