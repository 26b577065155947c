"""Who a process is, for locks and heartbeats: looked up by others, it is not taken for another that got its number."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any


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
