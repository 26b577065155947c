"""The search as Ray Tune sees it: which trial comes next, which is stopped early, what is recorded. All state is in the record."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ray.tune import Callback
from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler
from ray.tune.search import Searcher

from gdd_dist.runtime.monitor import say
from tune.proposals import Proposals
from tune.record import DEFAULTS, FAILED, FINISHED, STOPPED, Outcome, Record
from tune.trial import told

ENDED = (FINISHED, STOPPED)
"""Statuses of trials whose value counts."""


class Proposer(Searcher):
    """Gives Tune its trials: unfinished ones first (``again``), then new ones up to ``total``. ``room``: how many fit now at a time."""

    def __init__(
        self,
        record: Record,
        proposals: Proposals,
        total: int,
        metric: str,
        room: Callable[[], int],
        again: Sequence[str],
    ) -> None:
        super().__init__(metric=metric, mode="max")
        self._record, self._proposals, self._total = record, proposals, total
        self._room, self._again = room, list(again)
        self._known = record.proposed()
        self._running: dict[str, str] = {}

    def suggest(self, trial_id: str) -> Any:
        """Return the next trial's id and settings, None while there is no room for it."""
        if len(self._running) >= max(1, self._room()):
            return None  # a trial that is drawn later can learn from more trials that have ended
        if self._again:
            name = self._again.pop(0)
        elif len(self._known) < self._total:
            name = f"{len(self._known):03d}"
            self._known[name] = {} if name == DEFAULTS else self._proposals.propose(name)
            self._record.propose(name, self._known[name])
        else:
            return str(Searcher.FINISHED)
        self._running[trial_id] = name
        return {"id": name, "out": str(self._record.directory(name)), "settings": dict(self._known[name])}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell the sampler what a trial reached."""
        name = self._running.pop(trial_id)
        counts = not error and result is not None and result.get("status", STOPPED) in ENDED
        self._proposals.tell(name, result.get(self.metric) if counts and result else None)

    def save(self, checkpoint_path: str) -> None:
        """Write nothing, because the record has all."""
        Path(checkpoint_path).write_bytes(pickle.dumps(None))


class Asha(AsyncHyperBandScheduler):
    """Asynchronous successive halving over matching steps. The defaults are measured like all others but never stopped."""

    def __init__(self, metric: str, grace: int, steps: int) -> None:
        super().__init__(
            time_attr="step",
            metric=metric,
            mode="max",
            grace_period=min(grace, steps),
            max_t=steps,
            reduction_factor=2,
            stop_last_trials=False,
        )

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Return whether a trial goes on."""
        action = super().on_trial_result(tune_controller, trial, result)
        return TrialScheduler.CONTINUE if trial.config["id"] == DEFAULTS else action

    def replay(self, record: Record) -> None:
        """Take the measurements of earlier invocations as if they had come now."""
        controller: Any = None
        for name in record.proposed():
            past: Any = SimpleNamespace(trial_id=f"past-{name}", config={"id": name})  # all that it looks at
            self.on_trial_add(controller, past)
            for line in record.curve(name):
                self.on_trial_result(controller, past, told(line))


class Keeper(Callback):
    """Records and prints what trials report and how they end. ``until``: when the time budget ends; ``meanwhile`` is called often."""

    def __init__(self, record: Record, until: float, meanwhile: Callable[[], None]) -> None:
        self._record, self._until, self._meanwhile = record, until, meanwhile

    def on_step_begin(self, iteration: int, trials: list[Trial], **_info: Any) -> None:
        """Call ``meanwhile`` in each round of Tune's loop."""
        self._meanwhile()

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **_info: Any
    ) -> None:
        """Record an interval, or the end."""
        name = trial.config["id"]
        keys = ("step", "val", "stderr", "gap", "lower", "kept", "seconds", "host", "status", "fingerprint", "history")
        self._record.report(name, {k: result[k] for k in keys if k in result})
        if "status" not in result:
            say(f"trial {name}: step {result['step']}, {result['val']:.1f} ± {result['stderr']:.1f} % on val")

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **_info: Any) -> None:
        """Record the end of a trial, by its own last report; one that ran out of time is left for --resume."""
        last = trial.last_result or {}
        if "status" not in last and time.monotonic() >= self._until:
            say(f"trial {trial.config['id']}: out of time at step {last.get('step', 0)}; continue it with --resume")
            return
        self._end(trial, last.get("status", STOPPED), last.get("reason"))

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **_info: Any) -> None:
        """Tell the user that Ray starts a trial again, because its process or node is gone."""
        say(f"trial {trial.config['id']}: lost its process or node; it continues from its checkpoint elsewhere")

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **_info: Any) -> None:
        """Record that a trial was lost too often."""
        fault = " ".join(str(trial.get_error() or "its process died").split())
        self._end(trial, FAILED, f"lost {trial.num_failures} times: {fault[-300:]}")

    def _end(self, trial: Trial, status: str, reason: str | None) -> None:
        """Write a line of trials.jsonl from what the trial has reported."""
        name = trial.config["id"]
        lines = self._record.reports(name)
        measured = [line for line in lines if "val" in line]
        kept = measured[-1] if measured and status in ENDED else {}
        outcome = Outcome(
            id=name,
            status=status,
            settings=dict(trial.config["settings"]),
            **{figure: kept.get(figure) for figure in ("val", "stderr", "gap")},
            kept=kept.get("kept", kept.get("step")),
            steps=max((line["step"] for line in measured), default=0),
            seconds=round(sum(line.get("seconds", 0.0) for line in lines), 1),
            hosts=tuple(dict.fromkeys(line["host"] for line in lines if "host" in line)),
            fingerprint=kept.get("fingerprint") if status == FINISHED else None,
            reason=reason,
        )
        self._record.finish(outcome)
        value = "" if outcome.val is None else f", {outcome.val:.1f} ± {outcome.stderr:.1f} % on val"
        say(f"trial {name}: {status} after {outcome.steps} steps{value}{f' ({reason})' if reason else ''}")
