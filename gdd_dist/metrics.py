"""metrics.json: what was measured, and what made it. It names no path, host or user."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from gdd_dist.context import Context

FORMAT = "gdd-report/1"
PACKAGES = ("gdd_dist", "torch", "torchvision", "numpy")


def versions() -> dict[str, str]:
    """Versions of Python and the libraries that shape numbers."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


@cache
def commit() -> str | None:
    """The commit of the checkout this file is tracked in; None if there is none."""
    here = Path(__file__)
    if _git(here.parent, "ls-files", "--error-unmatch", here.name) is None:  # installed, maybe inside another checkout
        return None
    return _git(here.parent, "rev-parse", "--verify", "HEAD")


def changed() -> bool:
    """Whether tracked files differ from that commit."""
    return bool(commit() and _git(Path(__file__).parent, "status", "--porcelain", "--untracked-files=no"))


def _git(directory: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=directory, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def hardware(ctx: Context) -> dict[str, Any]:
    """What computed the rows: devices, cores of rank 0's host, ranks."""
    cuda = ctx.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(ctx.device) if cuda else "cpu",
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "ranks": ctx.world.size,
        "precision": ctx.precision,
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def selected(history: Sequence[Mapping[str, Any]], select: str) -> Mapping[str, Any] | None:
    """The interval whose generator was kept: the first that is best on val, or the last; None without measurements."""
    if not history:
        return None
    return history[-1] if select == "last" else max(history, key=lambda h: h["val"])


def shortcut_gap(history: Sequence[Mapping[str, Any]], select: str) -> dict[str, Any] | None:
    """Quick students' accuracy on fresh generated images minus on val, in points: of the GAN (step 0) and of the kept interval."""
    kept = selected(history, select)
    if kept is None:
        return None
    return {"gan": history[0]["gap"], "matched": kept["gap"], "selected_step": kept["step"]}


def document(
    ctx: Context,
    fingerprints: Mapping[str, str],
    history: Sequence[Mapping[str, Any]],
    results: Sequence[Mapping[str, Any]],
    more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """metrics.json. ``fingerprints``: of "data" and the steps; ``history``: matching's measurements on val; ``more``: what else was measured."""
    return {
        "format": FORMAT,
        "fingerprints": {
            "data": fingerprints["data"],
            "teachers": fingerprints["teachers"],
            "logits": fingerprints["logits"],
            "generator": fingerprints["matching"],
        },
        "hardware": hardware(ctx),
        "versions": versions(),
        "commit": commit(),
        "verified": ctx.config.verify,
        "classes": list(ctx.manifest.classes),
        "shortcut_gap": shortcut_gap(history, ctx.config.matching.select),
        **(more or {}),
        "results": [dict(r) for r in results],
    }
