"""What the search gained: the best settings and the defaults, each retrained with new seeds and read on test. Nothing before reads test."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gdd_dist.config.settings import Config
from gdd_dist.storage.json_files import read_json, write_json
from tune import gang, space
from tune.gang import Job
from tune.record import DEFAULTS, Outcome

FILE = "final.json"


@dataclass(frozen=True)
class Gain:
    """Accuracies on test in percent, one a new seed, of the best settings, of the defaults and of the GAN before matching.

    ``best``, ``defaults``: a seed's mean over its students; ``row``: student, protocol, labels, ipc.
    """

    trial: str
    seeds: tuple[int, ...]
    best: tuple[float, ...]
    defaults: tuple[float, ...]
    gan: tuple[float, ...]
    row: Mapping[str, Any]

    @property
    def mean(self) -> float:
        """The gain in points, seed by seed against the defaults with the same seed."""
        return float(np.mean(np.subtract(self.best, self.defaults)))

    @property
    def stderr(self) -> float | None:
        """The gain's standard error over seeds; None with one."""
        gains = np.subtract(self.best, self.defaults)
        return float(gains.std(ddof=1) / len(gains) ** 0.5) if len(gains) > 1 else None


def measure(base: Job, out: Path, best: Outcome, seeds: int) -> Gain:
    """Retrain and measure, as many at a time as fit; keeps the result in OUT/final.json."""
    arms: dict[str, Mapping[str, Any]] = {"defaults": {}} | ({"best": best.settings} if best.id != DEFAULTS else {})
    numbers = range(1, seeds + 1)
    jobs = {
        (arm, n): dataclasses.replace(base, config=config_of(base.config, out, arm, settings, n))
        for arm, settings in arms.items()
        for n in numbers
    }
    gang.run_all(list(jobs.values()))
    found = {k: read_json(job.out / "report" / "latest" / "metrics.json")["results"] for k, job in jobs.items()}
    rows = {key: {str(r["train_on"]): r for r in results} for key, results in found.items()}
    arm = "best" if "best" in arms else "defaults"
    row = rows[arm, 1]["matched"]
    gain = Gain(
        trial=best.id,
        seeds=tuple(base.config.step_seed("matching") + n for n in numbers),
        best=tuple(rows[arm, n]["matched"]["mean"] for n in numbers),
        defaults=tuple(rows["defaults", n]["matched"]["mean"] for n in numbers),
        gan=tuple(rows["defaults", n]["gan"]["mean"] for n in numbers),
        row={k: row[k] for k in ("student", "protocol", "labels", "ipc", "optimizer_steps")},
    )
    write_json(out / FILE, {"format": "gdd-search-gain/1", **dataclasses.asdict(gain)})
    return gain


def load(out: Path, trial: str, seeds: int) -> Gain | None:
    """What an earlier invocation measured of this trial with as many seeds, if any did."""
    if not (out / FILE).exists():
        return None
    body: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in read_json(out / FILE).items()}
    body.pop("format")
    gain = Gain(**body)
    return gain if gain.trial == trial and len(gain.seeds) == seeds else None


def config_of(config: Config, out: Path, arm: str, settings: Mapping[str, Any], number: int) -> Config:
    """One whole retraining from the shared artifacts, with seeds of matching and of students that no trial used.

    The report is its first row alone, beside the GAN's.
    """
    r = config.report
    report = dataclasses.replace(
        r,
        seed=config.step_seed("report") + number,
        ipc=r.ipc[:1],
        students=r.students[:1],
        protocol=r.protocol[:1],
        labels=r.labels[:1],
        baselines=("gan",),
    )
    new = space.apply(config, {**settings, "matching.seed": config.step_seed("matching") + number})
    where = str(out / "final" / f"{arm}-{number}")
    return dataclasses.replace(new, report=report, until="report", out=where, verify=False)
