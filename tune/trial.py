"""A trial, which runs inside Ray: the trainer's own matching step, in OUT/trials/<id>, on the store that all trials share."""

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
    """The generator has weights that are not finite, which no further step can mend."""


class Teller:
    """Reports to the search at intervals, with the seconds since the last report."""

    def __init__(self, steps: int) -> None:
        node, address = gang.here()
        self._steps, self._since = steps, time.monotonic()
        self._host = f"{address}#{node[:8]}"  # nodes may share an address

    def tell(self, report: Mapping[str, Any]) -> None:
        """Hand a report to the search, which may end this trial here (SystemExit)."""
        now = time.monotonic()
        spent, self._since = now - self._since, now
        ray.tune.report({**report, "seconds": round(spent, 3), "host": self._host})

    def interval(self, step: int, generator: nn.Module, measured: Measurement) -> None:
        """Report an interval of matching. The last one is reported when the step's directory is complete."""
        if not all(bool(torch.isfinite(p).all()) for p in generator.parameters()):
            raise Diverged(f"not finite after {step} steps")
        if step < self._steps:
            self.tell(told(measured.as_dict()))


def told(measured: Mapping[str, Any]) -> dict[str, Any]:
    """Return a measurement with the metrics that a search may ask for."""
    return {**measured, "lower": measured["val"] - measured["stderr"]}


def trial(config: Mapping[str, Any], base: Job) -> None:
    """Run one trial of the search's job ``base`` and report how it ended.

    Faults of its own are reported, not raised, because Ray would only run it into them again. A lost rank or node is raised, so
    that Ray runs the trial again; it then continues from its checkpoint.
    """
    out = config["out"]
    if not Path(out).is_dir():  # a node that joined after the search had checked its nodes
        raise gang.PeerLost(f"node {gang.here()[1]} cannot see {out}; mount the shared storage there")
    settings = space.apply(base.config, config["settings"])
    # The files that a trial reads were hashed when the shared steps ran.
    job = dataclasses.replace(base, config=dataclasses.replace(settings, out=out, until="matching", verify=False))
    teller = Teller(settings.matching.steps)
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
    """Return the kept interval's measurement, and those of all intervals, from the finished matching step."""
    history = read_network(job.out / "matching" / "latest" / GENERATOR)[1]["history"]
    kept = best(history, job.config.matching.select)
    assert kept is not None
    end = {"step": history[-1]["step"], "kept": kept["step"], "history": history}
    return {**told(kept), **end, "fingerprint": steps["matching"]["fingerprint"]}
