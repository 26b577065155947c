"""Who a process is, for locks and heartbeats: looked up by others, it is not taken for another that got its number."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from sharding.errors import UserError


def me() -> dict[str, Any]:
    """This process, {host, space, pid, born}, so that others can look it up. ``space``: where its number means something."""
    return {
        "host": socket.gethostname(),
        "space": _space(),
        "pid": os.getpid(),
        "born": born(os.getpid()),
    }


def _space() -> str | None:
    """This boot of this machine and this container's process numbers: hosts and containers may share a name."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    return None


def local(holder: Mapping[str, Any]) -> bool:
    """Whether that process can be looked up from this one."""
    return holder.get("born") is not None and holder.get("space") is not None and holder["space"] == _space()


def born(pid: int) -> int | None:
    """When a process began, in clock ticks since boot, so that a reused number is not taken for its former owner.

    None for one that has ended, even if its parent has not looked (in containers the first process often never does).
    """
    with suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[19]) if fields[0] not in "ZX" else None
    return None


def place() -> tuple[int, int, int, int]:
    """(rank, size, local rank, local size) as the launcher has set them; one process alone without. Raises UserError."""
    # deepspeed's launcher has a name of its own for the last
    local_size = "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in os.environ else "LOCAL_SIZE"
    defaults = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", local_size: "1"}
    given = {name: os.environ.get(name) or default for name, default in defaults.items()}
    rank, size, local, here = (int(v) if v.isdecimal() else -1 for v in given.values())
    if not (0 <= rank < size and local >= 0 and here >= 1):
        words = ", ".join(f"{name}={value}" for name, value in given.items())
        raise UserError(f"{words} in the environment do not fit; start with torchrun, or unset them")
    return rank, size, local, here
