"""The steps before matching: computed once, before the first trial, by one job under the store's locks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import torch

from gdd_dist.config.settings import Config
from gdd_dist.config.steps import STEPS
from gdd_dist.engines.precision import resolve_precision
from gdd_dist.runtime.monitor import say
from gdd_dist.storage.json_files import read_json, write_json
from tune import gang
from tune.gang import Job

FILE = "shared.json"
SHARED = STEPS[: STEPS.index("matching")]


def compute(base: Job, out: Path, ranks: int, meanwhile: Callable[[], None] = lambda: None) -> None:
    """Compute what is missing, on ``ranks`` ranks, hashing what is there; keep what it cost in OUT/shared.json.

    ``meanwhile`` is called every second.
    """
    config = dataclasses.replace(base.config, out=str(out / "shared"), until=SHARED[-1])
    job = dataclasses.replace(base, config=config, ranks=ranks)
    steps = gang.run_all([job], _Lines(job.out, meanwhile))[0]
    path = out / FILE
    cost: dict[str, Any] = read_json(path) if path.exists() else {"format": "gdd-shared/1", "steps": {}}
    for name in SHARED:
        if steps[name]["status"] != "reused":
            before = cost["steps"].get(name, {"seconds": 0.0})["seconds"]
            cost["steps"][name] = {"seconds": before + steps[name]["seconds"], "ranks": job.ranks}
    write_json(path, cost)


def cost(out: Path) -> float:
    """Rank-seconds that the shared steps took this search; 0 where another run had computed them."""
    path = out / FILE
    steps: dict[str, Any] = read_json(path)["steps"] if path.exists() else {}
    return float(sum(s["seconds"] * s["ranks"] for s in steps.values()))


class _Lines:
    """Says once of each shared step how it went, as it ends; calls ``meanwhile`` too."""

    def __init__(self, directory: Path, meanwhile: Callable[[], None]) -> None:
        self._path, self._told, self._meanwhile = directory / "steps.json", set[str](), meanwhile
        self._path.unlink(missing_ok=True)

    def __call__(self) -> None:
        self._meanwhile()
        if not self._path.exists():
            return
        for name, step in read_json(self._path)["steps"].items():
            if name not in self._told:
                self._told.add(name)
                say(f"search: {name} {step['status']} ({step['seconds']:.1f} s)")


def settle_precision(base: Job) -> Config:
    """``auto`` as the first node that is free resolves it: all nodes then compute alike, and share what was computed."""
    if base.config.precision != "auto":
        return base.config

    def ask() -> str:
        cuda = base.config.device != "cpu" and torch.cuda.is_available()
        return resolve_precision("auto", torch.device("cuda" if cuda else "cpu"))

    found: str = ray.get(ray.remote(num_cpus=base.cpus, num_gpus=base.gpus, max_calls=1)(ask).remote())
    return dataclasses.replace(base.config, precision=found)
