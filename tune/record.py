"""What a search remembers, in plain files of its own, because Ray's state may be lost.

OUT/trials/<id>/trial.json       the settings of a trial, written before it starts
OUT/trials/<id>/progress.jsonl   what it reported, a line for each interval
OUT/trials.jsonl                 a line for each trial that has ended
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gdd_dist.runtime.monitor import say
from gdd_dist.storage.json_files import ALONE, append_json, json_lines, read_json, write_json
from sharding.errors import UserError

FINISHED, STOPPED, DIVERGED, FAILED = "finished", "stopped", "diverged", "failed"
DEFAULTS = "000"
"""Id of the trial with the plain defaults; the others are numbered from 001."""


@dataclass(frozen=True)
class Outcome:
    """How a trial ended. ``val``: accuracy of quick students on val in percent, ``stderr`` its standard error over students, ``gap`` the
    shortcut gap, all of the interval ``kept``; ``steps``: matching steps done; ``seconds``: of all its attempts, as far as reported.

    ``settings``: what differs from the defaults; ``fingerprint``: of the matching step, of finished trials alone.
    """

    id: str
    status: str
    settings: Mapping[str, Any]
    val: float | None = None
    stderr: float | None = None
    gap: float | None = None
    kept: int | None = None
    steps: int = 0
    seconds: float = 0.0
    hosts: tuple[str, ...] = ()
    fingerprint: str | None = None
    reason: str | None = None

    def value(self, metric: str) -> float:
        """Return what trials are compared by; -inf if this one measured nothing."""
        if self.val is None:
            return float("-inf")
        return self.val - (self.stderr or 0.0 if metric == "lower" else 0.0)


class Record:
    """The files below one OUT, which only the driver writes."""

    def __init__(self, out: Path) -> None:
        self.out, self._file = out, out / "trials.jsonl"

    def directory(self, trial: str) -> Path:
        """Return OUT/trials/<id>, where the trial runs."""
        return self.out / "trials" / trial

    def propose(self, trial: str, settings: Mapping[str, Any]) -> None:
        """Record a trial before it starts."""
        self.directory(trial).mkdir(parents=True, exist_ok=True)
        write_json(self.directory(trial) / "trial.json", {"id": trial, "settings": dict(settings)})

    def proposed(self) -> dict[str, dict[str, Any]]:
        """Return id → settings of every trial that ever began, in order."""
        found = sorted((self.out / "trials").glob("*/trial.json"))
        return {path.parent.name: read_json(path, lambda trial: dict(trial["settings"]), ALONE) for path in found}

    def report(self, trial: str, line: Mapping[str, Any]) -> None:
        """Record what a trial measured at an interval."""
        append_json(self.directory(trial) / "progress.jsonl", line)

    def curve(self, trial: str) -> list[dict[str, Any]]:
        """Return what a trial measured, by step; the later result if a second attempt measured a step again."""
        whole = [line["history"] for line in self.reports(trial) if "history" in line]
        if whole:
            return list(whole[-1])
        by_step = {int(line["step"]): line for line in self.reports(trial) if "val" in line and "status" not in line}
        return [by_step[step] for step in sorted(by_step)]

    def reports(self, trial: str) -> list[dict[str, Any]]:
        """Return all that the attempts of a trial reported, in order."""
        return list(_lines(self.directory(trial) / "progress.jsonl"))

    def finish(self, outcome: Outcome) -> None:
        """Record that a trial has ended."""
        append_json(self._file, {"format": "gdd-trial/1", **dataclasses.asdict(outcome)})

    def outcomes(self) -> dict[str, Outcome]:
        """Return id → how the trial ended, in order of ids."""
        names, found = {f.name for f in dataclasses.fields(Outcome)}, dict[str, Outcome]()
        for line in _lines(self._file):
            if {"id", "status", "settings"} <= line.keys():
                values: dict[str, Any] = {
                    k: tuple(v) if isinstance(v, list) else v for k, v in line.items() if k in names
                }
                found[str(line["id"])] = Outcome(**values)
        return dict(sorted(found.items()))


def best_of(record: Record, metric: str) -> Outcome:
    """Return the finished trial that is best in ``metric``, the earliest of equals. Raises UserError if none has finished."""
    finished = [o for o in record.outcomes().values() if o.status == FINISHED]
    if not finished and not record.outcomes():
        cure = "continue with --resume and a longer --time-budget"
        raise UserError(f"no trial finished within --time-budget; {cure}")
    if not finished:
        why = f"{record.out}/trials.jsonl gives the reasons; trials that ran out of time continue with --resume"
        raise UserError(f"no trial has finished; {why}")
    return max(finished, key=lambda o: o.value(metric))


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON-lines file; tell the user of each damaged line."""
    for number, line in json_lines(path):
        if isinstance(line, dict):
            yield line
        else:
            say(f"search: line {number} of {path} is damaged; its trial continues from its checkpoint or runs again")
