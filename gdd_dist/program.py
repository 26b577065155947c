"""What every program shares: one ``error:`` line and status 2 for a fault the user can mend, `stopped: …` from the other ranks."""

from __future__ import annotations

import errno
import os
import sys
import time
import traceback
from collections.abc import Callable

from gdd_dist.distributed import PeerError, World, claim_before_joining, end_with, stop_with_parent
from sharding.errors import UserError

_PEER_FAULT = 5.0


def run_program(main: Callable[[list[str], Callable[[World], None]], None], argv: list[str]) -> None:
    """Call ``main(argv, joined)``, which hands its World to ``joined``; leave with 0, or 2 for a UserError, or 1."""
    world: World | None = None

    def joined(w: World) -> None:
        nonlocal world
        world = w

    stop_with_parent(int(os.environ.get("RANK", 0)))
    try:
        main(argv, joined)
        if world is not None:
            world.close()
    except Exception as e:
        end_with(report_failure(e, world, "--debug" in argv))
    except SystemExit as e:
        end_with(int(e.code or 0))
    except KeyboardInterrupt:
        sys.stderr.write("stopped: interrupted; the same command goes on from the last checkpoint\n")
        end_with(130)
    end_with(0)


def report_failure(fault: Exception, world: World | None, debug: bool) -> int:
    """Say what went wrong, once over all ranks; returns the exit status."""
    rank = int(os.environ.get("RANK", 0))
    size = int(os.environ.get("WORLD_SIZE", 1))
    user = isinstance(fault, (UserError, OSError)) and not isinstance(fault, TimeoutError)
    if not user and _is_peer_fault(fault, world):
        sys.stderr.write(f"stopped: rank {rank}, because another rank failed\n")
        return 2
    mine = world.claim_failure() if world is not None else size == 1 or claim_before_joining()
    if not mine:
        sys.stderr.write(f"stopped: rank {rank}, because another rank failed\n")
        time.sleep(_PEER_FAULT)  # torchrun blames, and reports, whoever is gone first
        return 2
    if debug or not user:
        traceback.print_exception(fault)
    sys.stderr.write(f"error: {describe(fault)}\n")
    return 2 if user else 1


def describe(fault: Exception) -> str:
    """One line: what is wrong; what to do."""
    if isinstance(fault, OSError) and not isinstance(fault, UserError):
        remedies = {
            errno.ENOSPC: "free some space and run the same command again",
            errno.EDQUOT: "make room in your quota and run the same command again",
            errno.EROFS: "make it writable or choose another --out",
            errno.EACCES: "check its permissions",
        }
        name = f"{fault.filename}: " if fault.filename else ""
        return f"{name}{fault.strerror or fault}; {remedies.get(fault.errno or 0, 'mend it and run the same command again')}"
    return " ".join(str(fault).split()) or type(fault).__name__


def _is_peer_fault(fault: Exception, world: World | None) -> bool:
    """Whether this fault is only the echo of another rank's: give that rank a moment to claim it."""
    if isinstance(fault, PeerError):
        return True
    if world is None or world.size == 1:
        return False
    deadline = time.monotonic() + _PEER_FAULT
    while time.monotonic() < deadline:
        if world.failed():
            return True
        time.sleep(0.05)
    return False
