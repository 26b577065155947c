"""Identifies a process for locks and heartbeats, so that another process that reuses its pid is not mistaken for it."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from sharding.errors import UserError


def me() -> dict[str, Any]:
    """Return this process as {host, space, pid, born}, so that others can look it up. ``space``: where its pid is valid."""
    return {
        "host": socket.gethostname(),
        "space": _space(),
        "pid": os.getpid(),
        "born": born(os.getpid()),
    }


def _space() -> str | None:
    """Return ids of this boot and of this pid namespace, because hosts and containers may have the same name."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    return None


def local(holder: Mapping[str, Any]) -> bool:
    """Whether the process can be looked up from this one."""
    return holder.get("born") is not None and holder.get("space") is not None and holder["space"] == _space()


def born(pid: int) -> int | None:
    """Return the start time of a process, in clock ticks since boot, which tells it from an earlier process with its pid.

    None if it has ended, even if its parent has not collected it (the first process of a container often never does).
    """
    with suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[19]) if fields[0] not in "ZX" else None
    return None


def place() -> tuple[int, int, int, int]:
    """Return (rank, size, local rank, local size) as set by the launcher, or one single process. Raises UserError."""
    # deepspeed's launcher has its own name for the local size
    local_size = "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in os.environ else "LOCAL_SIZE"
    defaults = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", local_size: "1"}
    given = {name: os.environ.get(name) or default for name, default in defaults.items()}
    rank, size, local, here = (int(v) if v.isdecimal() else -1 for v in given.values())
    if not (0 <= rank < size and local >= 0 and here >= 1):
        words = ", ".join(f"{name}={value}" for name, value in given.items())
        raise UserError(f"{words} in the environment are not valid; start with torchrun, or unset them")
    if size > 1 and not os.environ.get("RANK"):
        raise UserError(f"WORLD_SIZE={size} is set in the environment, but not RANK; start with torchrun, or unset it")
    return rank, size, local, here
