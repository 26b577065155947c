"""metrics.json: the results and their provenance. It contains no path, host or user."""

import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from gdd_dist.evaluation.quick_students import INTERVAL, Candidates
from gdd_dist.runtime.versions import commit, versions
from gdd_dist.training.context import Context

FORMAT = "gdd-report/1"


def hardware(ctx: Context) -> dict[str, Any]:
    """Return the hardware that computed the rows: devices, cores of rank 0's host, ranks."""
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


def shortcut_gap(candidates: Candidates, select: str, start: str = "gan") -> dict[str, Any] | None:
    """Return quick students' accuracy on fresh generated images minus on val, in points, of the generator named ``start`` and the kept one.

    ``selected_step`` is None if the kept generator is not from an interval; ``selected`` then names it.
    """
    found = candidates.kept(select)
    if found is None:
        return None
    name, kept = found
    step = kept["step"] if name == INTERVAL else None
    gaps = {start: candidates.history[0]["gap"], "matched": kept["gap"]}
    return {**gaps, "selected_step": step, "selected": name}


def document(
    ctx: Context,
    fingerprints: Mapping[str, str],
    candidates: Candidates,
    results: Sequence[Mapping[str, Any]],
    more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """metrics.json. ``fingerprints``: of "data" and the steps; ``candidates``: matching's, measured on val; ``more``: further entries."""
    m = ctx.config.matching
    return {
        "format": FORMAT,
        "fingerprints": {
            **{name: fingerprints[name] for name in ("data", "teachers", "logits")},
            "generator": fingerprints["matching"],
        },
        "hardware": hardware(ctx),
        "versions": versions(),
        "commit": commit(),
        "verified": ctx.config.verify,
        "classes": list(ctx.manifest.classes),
        "shortcut_gap": shortcut_gap(candidates, m.select, m.start),
        **(more or {}),
        "results": [dict(r) for r in results],
    }
