"""What the search gained: the best settings and the defaults, retrained with new seeds and measured on test, which nothing else reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gdd_dist.config.settings import Config
from gdd_dist.reporting.verdict import Difference, difference
from gdd_dist.storage.json_files import ALONE, read_json, write_json
from tune import gang, space
from tune.gang import Job
from tune.record import DEFAULTS, Outcome

FILE = "final.json"


@dataclass(frozen=True)
class Gain:
    """Accuracies on test in percent for each new seed, as means over its students; ``gan``: of the GAN before matching.

    ``row``: student, protocol, labels, ipc, optimizer_steps.
    """

    trial: str
    seeds: tuple[int, ...]
    best: tuple[float, ...]
    defaults: tuple[float, ...]
    gan: tuple[float, ...]
    row: Mapping[str, Any]

    @property
    def difference(self) -> Difference:
        """Return the gain, paired by seed."""
        best, defaults = ({"seeds": self.seeds, "accuracies": values} for values in (self.best, self.defaults))
        return difference(best, defaults)


def measure(base: Job, out: Path, best: Outcome, seeds: Sequence[int]) -> Gain:
    """Retrain and measure, as many at a time as fit; keep the result in OUT/final.json. ``seeds``: of matching."""
    arms: dict[str, Mapping[str, Any]] = {"defaults": {}} | ({"best": best.settings} if best.id != DEFAULTS else {})
    numbers = [seed - base.config.step_seed("matching") for seed in seeds]
    jobs = {
        (arm, n): dataclasses.replace(base, config=config_of(base.config, out, arm, settings, n))
        for arm, settings in arms.items()
        for n in numbers
    }
    gang.run_all(list(jobs.values()))
    rows = {key: read_json(job.out / "report" / "latest" / "metrics.json", _rows) for key, job in jobs.items()}
    arm = "best" if "best" in arms else "defaults"
    row = rows[arm, numbers[0]]["matched"]
    gain = Gain(
        trial=best.id,
        seeds=tuple(seeds),
        best=tuple(rows[arm, n]["matched"]["mean"] for n in numbers),
        defaults=tuple(rows["defaults", n]["matched"]["mean"] for n in numbers),
        gan=tuple(rows["defaults", n]["gan"]["mean"] for n in numbers),
        row={k: row[k] for k in ("student", "protocol", "labels", "ipc", "optimizer_steps")},
    )
    write_json(out / FILE, {"format": "gdd-search-gain/1", **dataclasses.asdict(gain)})
    return gain


def load(out: Path, trial: str, seeds: Sequence[int]) -> Gain | None:
    """Return what an earlier invocation measured of this trial with these seeds, or None."""
    if not (out / FILE).exists():
        return None
    gain = read_json(out / FILE, _gain, ALONE)
    return gain if gain.trial == trial and gain.seeds == tuple(seeds) else None


def _rows(metrics: Any) -> dict[str, Any]:
    return {str(row["train_on"]): row for row in metrics["results"]}


def _gain(body: Any) -> Gain:
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in body.items() if k != "format"}
    return Gain(**values)


def config_of(config: Config, out: Path, arm: str, settings: Mapping[str, Any], number: int) -> Config:
    """Return a retraining, with seeds of matching and students that no trial used. It reports its first row and the GAN's."""
    r = config.report
    first: dict[str, Any] = {name: getattr(r, name)[:1] for name in ("ipc", "students", "protocol", "labels")}
    report = dataclasses.replace(r, seed=config.step_seed("report") + number, baselines=("gan",), **first)
    new = space.apply(config, {**settings, "matching.seed": config.step_seed("matching") + number})
    where = str(out / "final" / f"{arm}-{number}")
    return dataclasses.replace(new, report=report, until="report", out=where, verify=False)
