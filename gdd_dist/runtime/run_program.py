"""What every program shares: one ``error:`` line (status 2 for an error the user can fix, 1 for our bugs), `stopped: …` from other ranks."""

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
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gdd_dist.runtime.monitor import naming
from gdd_dist.runtime.process_identity import place
from gdd_dist.runtime.signals import PeerError, Preempted, Unreachable, asked, end_with, listen
from gdd_dist.runtime.versions import versions
from gdd_dist.storage.json_files import write_json
from sharding.errors import UserError
from sharding.redact import redact

if TYPE_CHECKING:  # --help must not wait for torch
    from gdd_dist.runtime.world import World

PREEMPTED = "preempted"
"""The file in OUT that tells launchers to start the job again, because torchrun exits with 1 in any case."""
_PEER_FAULT = 5.0
"""Seconds that a failing rank waits for others to report that they failed first."""
_OUTPUT = "standard output"
_GONE = "check that the disk is still mounted, then run the same command again"


class _Output(io.TextIOWrapper):
    """Standard output, which is named by the faults of writing to it."""

    def __init__(self, stream: io.TextIOWrapper) -> None:
        lines, through = stream.line_buffering, stream.write_through
        super().__init__(stream.buffer, stream.encoding, stream.errors, line_buffering=lines, write_through=through)
        self._stream = stream  # kept, because it closes the buffer when it is collected

    def write(self, text: str) -> int:
        with naming(Path(_OUTPUT)):
            return super().write(text)

    def flush(self) -> None:
        with naming(Path(_OUTPUT)):
            super().flush()


def run_program(main: Callable[[list[str], Callable[[World], None]], None], argv: list[str]) -> None:
    """Call ``main(argv, joined)``, which passes its World to ``joined``; exit with status 0, or 2 for a UserError, or 1."""
    world: World | None = None

    def joined(w: World) -> None:
        nonlocal world
        world = w  # set first, because faults while joining are reported through it
        asked.ranks = w.join().size
        asked.patient = True

    os.umask(os.umask(0) | 0o002)  # the user's umask, but no file is writable by all
    if "OMP_WAIT_POLICY" not in os.environ:
        # Read when torch is imported. By default GNU OpenMP's threads spin for milliseconds before they sleep, which takes the core from
        # the thread that they wait for, if other work runs on the machine (benchmarks/busy.py). They sleep sooner so.
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    make_printable()
    threading.excepthook = _in_thread
    listen(_rank())
    try:
        main(argv, joined)
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
        end_with(130, "stopped: interrupted; run the same command again to continue")
    end_with(0)


def make_printable() -> None:
    """Make every text printable: characters missing in the output's encoding are escaped; closed outputs discard it."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        if stream is None:  # closed; none of our files may get its free file descriptor
            nowhere = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(nowhere, nowhere == number)
            setattr(sys, name, open(nowhere, "r" if number == 0 else "w", encoding="utf-8", closefd=False))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
            if name == "stdout":
                sys.stdout = _Output(stream)


def _rank() -> str:
    """Return the rank as the launcher wrote it, since faults may be reported before it is parsed."""
    return os.environ.get("RANK", "0")


def _in_thread(fault: threading.ExceptHookArgs) -> None:
    """Report a thread's fault in one line; that of TensorBoard's writer is raised and reported in the main thread."""
    if type(fault.thread).__name__ != "_AsyncWriterThread" and isinstance(fault.exc_value, Exception):
        name = fault.thread.name if fault.thread else "unknown"
        _say(f"thread {name} has ended: {unforeseen(fault.exc_value)}")


def _say(line: str) -> None:
    """Print a last line; if nobody can read it, the exit status still tells what happened."""
    with suppress(OSError, ValueError):
        sys.stderr.write(f"{line}\n")


def note_preemption(world: World, out: Path) -> None:
    """Make rank 0 write OUT/preempted {signal, step, time} when all have saved; an earlier job's file is removed."""

    def write() -> None:
        when = time.strftime("%Y-%m-%d %H:%M:%S")
        write_json(out / PREEMPTED, {"signal": asked.name, "step": world.step, "time": when})

    if world.is_main:
        (out / PREEMPTED).unlink(missing_ok=True)
        world.on_preempted = write


def preempted(world: World | None) -> str:
    """Wait until all ranks have saved; return the message about it."""
    rank = _rank()
    if world is None or world.settle():
        return f"stopped: rank {rank}, by {asked.name}; all is saved, run the same command again to continue"
    return f"stopped: rank {rank}, by {asked.name}; a rank did not respond, the last checkpoint is intact"


def report_failure(fault: Exception, world: World | None, debug: bool) -> int:
    """Report what went wrong, once for all ranks; returns the exit status."""
    rank = _rank()
    fault = explained(fault, world)
    user = isinstance(fault, (UserError, OSError)) and not isinstance(fault, TimeoutError)
    if world is not None:
        world.quiet()
    if not user and _is_peer_fault(fault, world):
        _say(f"stopped: rank {rank}, because another rank failed")
        return asked.status if asked.number else 2
    if not user and isinstance(fault, RuntimeError) and world is not None and (gone := world.silent()):
        cure, user = "run the same command again to continue from the last checkpoint", True
        fault = UserError(f"{gone} is gone; {cure}")
    if not _is_mine(fault, world):
        _say(f"stopped: rank {rank}, because another rank failed")
        time.sleep(_PEER_FAULT)  # torchrun reports the rank that exits first as the cause
        return 2
    if debug:
        _say(_traceback(fault).rstrip())
    _say(f"error: {describe(fault) if user or debug else unforeseen(fault)}")
    return 2 if user else 1


def _is_mine(fault: Exception, world: World | None) -> bool:
    """Whether this rank reports the fault: the first one that asks, and one that cannot ask."""
    if isinstance(fault, Unreachable):
        return True
    if world is not None:
        return world.claim_failure()
    with suppress(UserError):  # a wrong environment names no other ranks
        if asked.among_ranks and place()[1] > 1:
            from gdd_dist.runtime.rendezvous import claim_before_joining  # loads torch

            return claim_before_joining()
    return True


def _traceback(fault: BaseException) -> str:
    return redact("".join(traceback.format_exception(fault)))


def unforeseen(fault: Exception) -> str:
    """Write the traceback of a bug of ours into a file; return one line that describes the bug and names the file."""
    what = f"{type(fault).__name__}: {describe(fault)}"
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="gdd-fault-", suffix=".txt", encoding="utf-8", errors="backslashreplace", delete=False
        ) as stream:
            stream.write(f"{' '.join(sys.argv[:1])}\n{versions()}\n{_traceback(fault)}")
    except (OSError, ImportError):  # the disk is full, or the package is not installed
        return f"{what} (unexpected: run it again with --debug and report what it prints)"
    return f"{what} (unexpected: please report it with {stream.name}; --debug prints the same here)"


def explained(fault: Exception, world: World | None) -> Exception:
    """Turn a lack of GPU or host memory into a UserError that says what to do; return other faults unchanged."""
    torch: Any = sys.modules.get("torch")
    of_gpu = torch is not None and isinstance(fault, torch.OutOfMemoryError)
    if not of_gpu and not isinstance(fault, MemoryError) and "DefaultCPUAllocator" not in str(fault):
        return fault
    remedies = {
        **{s: f"lower --{s}.batch, or split it with --accumulate, or use more ranks" for s in ("gan", "matching")},
        "teachers": "lower --teachers.batch, or set --teachers.accumulate or --teachers.activation_checkpointing",
    }
    step = world.step if world is not None else "start"
    remedy = remedies.get(step, "stop other programs that use it, or use one with more memory")
    where = "GPU" if of_gpu else "host"
    return UserError(f"rank {_rank()}'s {where} has not enough memory for step {step}; {remedy}")


def describe(fault: Exception) -> str:
    """Return one line: what is wrong; what to do."""
    if isinstance(fault, OSError) and not isinstance(fault, UserError):
        remedies = {
            errno.ENOSPC: "free some space and run the same command again",
            errno.EDQUOT: "free some of your quota and run the same command again",
            errno.EROFS: "make it writable or choose another --out",
            errno.EACCES: "check its permissions",
            errno.EFBIG: "raise the limit on the size of files (ulimit -f) and run the same command again",
            errno.EPIPE: "the program that read this output has ended; write the output to a file",
            **dict.fromkeys((errno.ENOENT, errno.EIO, errno.ESTALE, errno.ENOTCONN), _GONE),
        }
        if fault.filename == _OUTPUT:
            remedies |= dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EIO), "send the output to another place")
        name = f"{os.fsdecode(fault.filename)}: " if isinstance(fault.filename, (str, bytes)) else ""
        cure = remedies.get(fault.errno or 0, "fix this and run the same command again")
        return redact(f"{name}{fault.strerror or fault}; {cure}")
    text = str(fault).partition("Exception raised from")[0]  # torch appends its C++ stack
    return redact(" ".join(text.split())) or type(fault).__name__


def _is_peer_fault(fault: Exception, world: World | None) -> bool:
    """Whether another rank's fault caused this one: wait a moment for that rank to report it."""
    if isinstance(fault, PeerError):
        return True
    if world is None or world.size == 1:
        return False
    # A rank with a broken connection waits longer, so that the rank with the cause reports first.
    patience = 3 if "connection" in str(fault).lower() else 1
    deadline = time.monotonic() + patience * _PEER_FAULT
    while time.monotonic() < deadline:
        if world.failed() or (asked.number and not isinstance(fault, UserError)):
            return True  # torchrun stops the other ranks when one is dead
        time.sleep(0.05)
    return False
