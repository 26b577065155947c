"""What every program shares: one ``error:`` line (status 2 for a fault the user can mend, 1 for ours), `stopped: …` from the other ranks."""

from __future__ import annotations

import errno
import io
import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gdd_dist.runtime.monitor import naming
from gdd_dist.runtime.signals import PeerError, Preempted, asked, end_with, listen
from gdd_dist.runtime.versions import versions
from gdd_dist.storage.json_files import write_json
from sharding.errors import UserError
from sharding.redact import redact

if TYPE_CHECKING:  # --help is answered without torch
    from gdd_dist.runtime.world import World

PREEMPTED = "preempted"
"""The file in OUT that tells launchers to start the job again: torchrun itself exits with 1 whatever happened."""
_PEER_FAULT = 5.0
"""Seconds that a rank with a fault gives others to say that theirs came first."""
_GONE = "see whether the disk is still there, then run the same command again"


def run_program(main: Callable[[list[str], Callable[[World], None]], None], argv: list[str]) -> None:
    """Call ``main(argv, joined)``, which hands its World to ``joined`` to join it; leave with 0, or 2 for a UserError, or 1."""
    world: World | None = None

    def joined(w: World) -> None:
        nonlocal world
        world = w  # first: a fault of the meeting is told through it
        asked.ranks = w.join().size
        asked.patient = True

    os.umask(os.umask(0) | 0o002)  # the user's, but nothing is ever writable by all
    make_printable()
    threading.excepthook = _in_thread
    listen(_rank())
    try:
        main(argv, joined)
        with naming(Path("standard output")):
            sys.stdout.flush()
        if world is not None:
            world.close()
    except Preempted:
        end_with(asked.status, preempted(world))
    except Exception as e:
        end_with(report_failure(e, world, "--debug" in argv))
    except SystemExit as e:
        end_with(e.code if isinstance(e.code, int) else 1 if e.code else 0)
    except KeyboardInterrupt:
        end_with(130, "stopped: interrupted; the same command goes on from the last checkpoint")
    end_with(0)


def make_printable() -> None:
    """Whatever is printed can be: what the encoding of an output lacks is escaped, and a closed output swallows it."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        if stream is None:  # closed: its number is free, and no file of ours may get it
            nowhere = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(nowhere, nowhere == number)
            setattr(sys, name, open(nowhere, "r" if number == 0 else "w", encoding="utf-8", closefd=False))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _rank() -> str:
    """As the launcher wrote it: faults are reported before it is known to be a number."""
    return os.environ.get("RANK", "0")


def _in_thread(fault: threading.ExceptHookArgs) -> None:
    """TensorBoard's writer hands its fault to the main thread, which says it in one line."""
    if type(fault.thread).__name__ != "_AsyncWriterThread" and isinstance(fault.exc_value, Exception):
        name = fault.thread.name if fault.thread else "unknown"
        sys.stderr.write(f"thread {name} has ended: {unforeseen(fault.exc_value)}\n")


def note_preemption(world: World, out: Path) -> None:
    """From now on rank 0 writes OUT/preempted {signal, step, time} when all have saved; what an earlier job left there goes."""

    def write() -> None:
        when = time.strftime("%Y-%m-%d %H:%M:%S")
        write_json(out / PREEMPTED, {"signal": asked.name, "step": world.step, "time": when})

    if world.is_main:
        (out / PREEMPTED).unlink(missing_ok=True)
        world.on_preempted = write


def preempted(world: World | None) -> str:
    """Leave together after all have saved; the line that says so."""
    rank = _rank()
    if world is None or world.settle():
        return f"stopped: rank {rank}, asked to by {asked.name}; all is saved, the same command goes on from here"
    return f"stopped: rank {rank}, asked to by {asked.name}; another rank did not answer, the last checkpoint is whole"


def report_failure(fault: Exception, world: World | None, debug: bool) -> int:
    """Say what went wrong, once over all ranks; returns the exit status."""
    rank = _rank()
    fault = explained(fault, world)
    user = isinstance(fault, (UserError, OSError)) and not isinstance(fault, TimeoutError)
    if world is not None:
        world.quiet()
    if not user and _is_peer_fault(fault, world):
        sys.stderr.write(f"stopped: rank {rank}, because another rank failed\n")
        return asked.status if asked.number else 2
    if not user and isinstance(fault, RuntimeError) and world is not None and (gone := world.silent()):
        cure, user = "run the same command again: it goes on from the last checkpoint", True
        fault = UserError(f"{gone} is gone; {cure}")
    if world is not None:
        mine = world.claim_failure()
    elif not (mine := os.environ.get("WORLD_SIZE", "1") == "1"):
        from gdd_dist.runtime.rendezvous import claim_before_joining  # loads torch

        mine = claim_before_joining()
    if not mine:
        sys.stderr.write(f"stopped: rank {rank}, because another rank failed\n")
        time.sleep(_PEER_FAULT)  # torchrun blames, and reports, whoever is gone first
        return 2
    if debug:
        sys.stderr.write(_traceback(fault))
    sys.stderr.write(f"error: {describe(fault) if user or debug else unforeseen(fault)}\n")
    return 2 if user else 1


def _traceback(fault: BaseException) -> str:
    return redact("".join(traceback.format_exception(fault)))


def unforeseen(fault: Exception) -> str:
    """One line about a fault that is ours, after writing its traceback into a file that the line names."""
    what = f"{type(fault).__name__}: {describe(fault)}"
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="gdd-fault-", suffix=".txt", encoding="utf-8", errors="backslashreplace", delete=False
        ) as stream:
            stream.write(f"{' '.join(sys.argv[:1])}\n{versions()}\n{_traceback(fault)}")
    except (OSError, ImportError):  # no room for a file, or not an installed package
        return f"{what} (unforeseen: run it again with --debug and report what it shows)"
    return f"{what} (unforeseen: please report it with {stream.name}; --debug shows the same here)"


def explained(fault: Exception, world: World | None) -> Exception:
    """A fault that the user can mend as one that says how: a GPU or a host without enough memory."""
    torch: Any = sys.modules.get("torch")
    of_gpu = torch is not None and isinstance(fault, torch.OutOfMemoryError)
    if not of_gpu and not isinstance(fault, MemoryError) and "DefaultCPUAllocator" not in str(fault):
        return fault
    remedies = {
        **{s: f"lower --{s}.batch, or cut it with --accumulate, or use more ranks" for s in ("gan", "matching")},
        "teachers": "lower --teachers.batch, or set --teachers.accumulate or --teachers.activation_checkpointing",
    }
    step = world.step if world is not None else "start"
    remedy = remedies.get(step, "see what else uses it, or take one with more memory")
    where = "GPU" if of_gpu else "host"
    return UserError(f"rank {_rank()}'s {where} has not enough memory for step {step}; {remedy}")


def describe(fault: Exception) -> str:
    """One line: what is wrong; what to do."""
    if isinstance(fault, OSError) and not isinstance(fault, UserError):
        remedies = {
            errno.ENOSPC: "free some space and run the same command again",
            errno.EDQUOT: "make room in your quota and run the same command again",
            errno.EROFS: "make it writable or choose another --out",
            errno.EACCES: "check its permissions",
            errno.EFBIG: "raise the limit on the size of files (ulimit -f) and run the same command again",
            errno.EPIPE: "whoever read what this program prints has gone; send it to a file",
            **dict.fromkeys((errno.ENOENT, errno.EIO, errno.ESTALE, errno.ENOTCONN), _GONE),
        }
        name = f"{os.fsdecode(fault.filename)}: " if isinstance(fault.filename, (str, bytes)) else ""
        cure = remedies.get(fault.errno or 0, "mend it and run the same command again")
        return redact(f"{name}{fault.strerror or fault}; {cure}")
    text = str(fault).partition("Exception raised from")[0]  # torch's own C++ stack follows
    return redact(" ".join(text.split())) or type(fault).__name__


def _is_peer_fault(fault: Exception, world: World | None) -> bool:
    """Whether this fault is only the echo of another rank's: give that rank a moment to claim it."""
    if isinstance(fault, PeerError):
        return True
    if world is None or world.size == 1:
        return False
    # Who meets a broken connection waits longer than who meets the cause of it, and so does not speak first.
    patience = 3 if "connection" in str(fault).lower() else 1
    deadline = time.monotonic() + patience * _PEER_FAULT
    while time.monotonic() < deadline:
        if world.failed() or (asked.number and not isinstance(fault, UserError)):
            return True  # torchrun asks the others to stop when a rank is dead
        time.sleep(0.05)
    return False
