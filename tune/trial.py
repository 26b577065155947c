"""A trial: the trainer's own matching step, in OUT/trials/<id>, on the store that all trials share. This runs inside Ray."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray.tune
import torch
from torch import nn

from gdd_dist.evaluation.quick_students import Measurement, best
from gdd_dist.models.files import GENERATOR, read_network
from gdd_dist.training import skipped_steps
from tune import gang, space
from tune.gang import Job
from tune.record import DIVERGED, FAILED, FINISHED


class Diverged(Exception):
    """The generator holds numbers that are not finite: nothing mends that."""


def job_of(base: Job, out: Path, settings: Mapping[str, Any]) -> Job:
    """A trial's job. ``base``: the search's, whose files were hashed when the shared steps ran."""
    config = space.apply(base.config, settings)
    return dataclasses.replace(base, config=dataclasses.replace(config, out=str(out), until="matching", verify=False))


def name_of(node: str, address: str) -> str:
    """A node as the record names it: several may share an address."""
    return f"{address}#{node[:8]}"


class Teller:
    """Reports to the search at intervals; each report says what was spent since the one before."""

    def __init__(self, steps: int) -> None:
        self._steps, self._since, self._host = steps, time.monotonic(), name_of(*gang.here())

    def tell(self, report: Mapping[str, Any]) -> None:
        """Hand a report to the search, which may end this trial here (SystemExit)."""
        now = time.monotonic()
        spent, self._since = now - self._since, now
        ray.tune.report({**report, "seconds": round(spent, 3), "host": self._host})

    def interval(self, step: int, generator: nn.Module, measured: Measurement) -> None:
        """What matching calls at intervals; the end is told when the step's directory is whole."""
        if not all(bool(torch.isfinite(p).all()) for p in generator.parameters()):
            raise Diverged(f"not finite after {step} steps")
        if step < self._steps:
            self.tell(told(measured.as_dict()))


def told(measured: Mapping[str, Any]) -> dict[str, Any]:
    """A measurement with the metrics that a search may ask for."""
    return {**measured, "lower": measured["val"] - measured["stderr"]}


def trial(config: Mapping[str, Any], base: Job) -> None:
    """Run one trial and report how it ended. Faults of its own are reported, not raised: Ray would only run it into them again.

    A lost rank or node is for Ray to retry; the trial then goes on from its checkpoint.
    """
    if not Path(config["out"]).is_dir():  # a node that joined after the search had looked at all there were
        raise gang.PeerLost(f"node {gang.here()[1]} cannot see {config['out']}; mount the shared storage there")
    job = job_of(base, Path(config["out"]), config["settings"])
    teller = Teller(job.config.matching.steps)
    try:
        steps = gang.run(job, teller.interval)
    except gang.PeerLost:
        raise
    except Diverged as e:
        teller.tell({"status": DIVERGED, "reason": str(e)})
    except Exception as e:
        status = DIVERGED if isinstance(e.__cause__, skipped_steps.Diverged) else FAILED
        reason = " ".join(str(e).split())[:300]
        teller.tell({"status": status, "reason": f"{type(e).__name__}: {reason}"})
    else:
        teller.tell({"status": FINISHED, **result(job, steps)})


def result(job: Job, steps: Mapping[str, Any]) -> dict[str, Any]:
    """What the finished matching step says of itself: the kept interval's measurement, and all there are."""
    history = read_network(job.out / "matching" / "latest" / GENERATOR)[1]["history"]
    kept = best(history, job.config.matching.select)
    assert kept is not None
    end = {"step": history[-1]["step"], "kept": kept["step"], "history": history}
    return {**told(kept), **end, "fingerprint": steps["matching"]["fingerprint"]}
