"""Signals to this process: a request to stop (SIGTERM, SIGUSR1: preemption), an interrupt (SIGINT), the end of its torchrun.

A thread listens for them, because Python's own handlers cannot run while the main thread is inside a collective.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

from sharding.errors import UserError
from sharding.interrupts import raise_again

GRACE = 15.0
"""Seconds in which ranks must agree to stop; launchers must allow the job more (torchrun, SLURM, Kubernetes: 30 s)."""
LONGEST_GRACE = 25.0
_LATE_SIGNAL = "at once, by another signal after the time to agree; the last checkpoint is intact"


class Preempted(Exception):
    """This job was asked to stop, and its progress is saved."""


class PeerError(Exception):
    """Another rank failed; its own message says why."""


class Unreachable(UserError):
    """This rank cannot connect to the others, so it reports this itself, without asking them."""


class Asked:
    """Whether this job was asked to stop. ``number``: the signal, 0 if there was none; ``heard``: an event, set by a signal.

    ``patient``: there is progress to save, so a signal must not end this process at once. ``ranks``: number of ranks of the job.
    ``among_ranks``: this program is one of the ranks that RANK and WORLD_SIZE describe, so a fault before they join is reported once
    for all. Other programs never look for ranks, because a shell inside a job has these variables, too. ``unwinding``: seconds that
    the main thread gets to clean up after an interrupt; ``remedy``: how the user continues.
    """

    def __init__(self) -> None:
        self.number, self.agreed, self.grace, self.patient, self.ranks = 0, False, GRACE, False, 1
        self.among_ranks, self.unwinding, self.remedy = False, 2.0, "run the same command again to continue"
        self.heard = threading.Event()
        self.wake: Callable[[], object] = lambda: None

    def note(self, number: int) -> None:
        """Record a signal, received here or by another rank."""
        self.number = self.number or number
        self.heard.set()
        self.wake()

    def allow(self, seconds: float) -> None:
        """Let ranks that train together take twice ``seconds``, the time of a step, to agree to stop."""
        if not self.number:
            self.grace = max(self.grace, min(2 * seconds, LONGEST_GRACE))

    @property
    def name(self) -> str:
        """SIGTERM, SIGUSR1."""
        return signal.Signals(self.number).name if self.number else "nobody"

    @property
    def status(self) -> int:
        """Return the exit status of a process ended by the signal."""
        return 128 + self.number


asked = Asked()
_at_end: list[Callable[[], None]] = []


def at_end(action: Callable[[], None]) -> None:
    """Call ``action`` before this process exits through `end_with`; it may take two seconds."""
    _at_end.append(action)


def end_with(status: int, line: str = "") -> NoReturn:
    """Print ``line`` and exit at once, from any thread, without an interpreter shutdown, in which gloo's threads could abort."""
    if line:
        with suppress(OSError):
            os.write(2, f"{line}\n".encode(errors="backslashreplace"))
    last = threading.Thread(target=_clean, daemon=True)
    last.start()
    last.join(2.0)  # a hanging file system or an unread pipe must not block the exit
    os._exit(status)


def _clean() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # the reader has ended; run_program has reported it if it matters
            stream.flush()
    for action in _at_end:
        action()


def listen(rank: str) -> None:
    """Start to handle the signals, and to exit when torchrun ends. Call it once, from the main thread."""
    told, tell = os.pipe()
    os.set_blocking(tell, False)
    threading.Thread(target=_hear, args=(told, rank), daemon=True, name="signals").start()
    signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
    asked.wake = lambda: os.write(tell, b"\0")
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _handler)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _end_with_parent()
    raise_again()


def _handler(_number: int, _frame: object) -> None:
    """Do nothing: the listening thread handles the signal, but Python needs a handler for it."""


def _hear(told: int, rank: str) -> None:
    """Record the first signal; exit if the ranks do not agree to stop in time.

    Further signals in that time belong to the same preemption: launchers repeat a signal and send it to every rank.
    """
    deadline, interrupted, late = float("inf"), False, False
    while True:
        wait = None if deadline == float("inf") else max(0.0, deadline - time.monotonic())
        if not select.select([told], [], [], wait)[0]:
            if interrupted:
                end_with(130, f"stopped: rank {rank}, interrupted; {asked.remedy}")
            if not asked.agreed:
                what = "the ranks did not agree" if asked.ranks > 1 else "no step ended"
                why = f"by {asked.name}, without saving: {what} within {asked.grace:.0f} s"
                end_with(asked.status, f"stopped: rank {rank}, {why}; the last checkpoint is intact")
            deadline, late = float("inf"), True
            continue
        number = os.read(told, 1)[0]
        if number == 0 and deadline == float("inf") and not late:  # another rank received the signal
            deadline = time.monotonic() + asked.grace
        elif number == signal.SIGINT:  # the main thread also gets it, unless it is inside a collective
            interrupted, deadline = True, time.monotonic() + asked.unwinding
        elif number in (signal.SIGTERM, signal.SIGUSR1) and signal.getsignal(number) is _handler:
            if not asked.patient:
                end_with(128 + number, f"stopped: rank {rank}, by {signal.Signals(number).name}; nothing was started")
            if late:
                end_with(128 + number, f"stopped: rank {rank}, {_LATE_SIGNAL}")
            if not asked.number:
                deadline = time.monotonic() + asked.grace
                asked.note(number)


@contextmanager
def stoppable(said: str) -> Iterator[Callable[[], None]]:
    """Let SIGTERM, SIGUSR1 and SIGHUP raise SystemExit in the block, so that it can clean up; they print ``stopped: by NAME; said``.

    Yields a function, after whose call they are ignored until the block ends. A signal that this process already ignores, as under
    nohup, stays ignored. Outside the main thread, where Python cannot handle signals, nothing changes.
    """
    here = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP) if here else ()
    before = {n: handler for n in numbers if (handler := signal.getsignal(n)) not in (signal.SIG_IGN, None)}

    def ignore() -> None:
        for number in before:
            signal.signal(number, signal.SIG_IGN)

    def stop(number: int, _frame: object) -> NoReturn:
        ignore()  # launchers repeat a signal, which must not end the cleaning up
        sys.stderr.write(f"stopped: by {signal.Signals(number).name}; {said}\n")
        raise SystemExit(128 + number)

    try:
        for number in before:
            signal.signal(number, stop)
        yield ignore
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_with_parent() -> None:
    """torchrun starts each rank in a session of its own, so killing its process group does not reach the ranks."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() == 1:
            end_with(143)
