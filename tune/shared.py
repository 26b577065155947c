"""The steps before matching: one job computes them once, before the first trial, under the store's locks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import torch

from gdd_dist.config.steps import STEPS
from gdd_dist.engines.precision import resolve_precision
from gdd_dist.runtime.monitor import say
from gdd_dist.storage.json_files import ALONE, read_json, write_json
from gdd_dist.storage.store import RECORDS, read_records
from tune import gang
from tune.gang import Job

FILE = "shared.json"
SHARED = STEPS[: STEPS.index("matching")]


def compute(base: Job, out: Path, ranks: int, meanwhile: Callable[[], None] = lambda: None) -> None:
    """Compute what is missing, on ``ranks`` ranks, and write the cost to OUT/shared.json. ``meanwhile`` is called every second."""
    config = dataclasses.replace(base.config, out=str(out / "shared"), until=SHARED[-1])
    job = dataclasses.replace(base, config=config, ranks=ranks)
    steps = gang.run_all([job], _Lines(job.out, meanwhile))[0]
    costs = _costs(out)
    for name in SHARED:
        if steps[name]["status"] != "reused":
            before = costs.get(name, {"seconds": 0.0})["seconds"]
            costs[name] = {"seconds": before + steps[name]["seconds"], "ranks": job.ranks}
    write_json(out / FILE, {"format": "gdd-shared/1", "steps": costs})


def cost(out: Path) -> float:
    """Return the rank-seconds of the shared steps; 0 if another run had computed them."""
    return float(sum(s["seconds"] * s["ranks"] for s in _costs(out).values()))


def _costs(out: Path) -> dict[str, dict[str, Any]]:
    """Return STEP → {seconds, ranks} of OUT/shared.json; {} without the file."""

    def take(document: Any) -> dict[str, dict[str, Any]]:
        steps = document["steps"].items()
        return {name: {"seconds": float(s["seconds"]), "ranks": int(s["ranks"])} for name, s in steps}

    return read_json(out / FILE, take, ALONE) if (out / FILE).exists() else {}


class _Lines:
    """Tells the user once how each shared step ended; calls ``meanwhile``, too."""

    def __init__(self, directory: Path, meanwhile: Callable[[], None]) -> None:
        self._out, self._told, self._meanwhile = directory, set[str](), meanwhile
        (directory / RECORDS).unlink(missing_ok=True)

    def __call__(self) -> None:
        self._meanwhile()
        for name, step in read_records(self._out).items():
            if name not in self._told:
                self._told.add(name)
                say(f"search: {name} {step['status']} ({step['seconds']:.1f} s)")


def settle_precision(base: Job) -> Job:
    """Return the job with precision ``auto`` as the first free node resolves it, so that all nodes compute alike."""
    if base.config.precision != "auto":
        return base

    def ask() -> str:
        cuda = base.config.device != "cpu" and torch.cuda.is_available()
        return resolve_precision("auto", torch.device("cuda" if cuda else "cpu"))

    found: str = ray.get(ray.remote(num_cpus=base.cpus, num_gpus=base.gpus, max_calls=1)(ask).remote())
    return dataclasses.replace(base, config=dataclasses.replace(base.config, precision=found))
