"""The search in TensorBoard: the hparams page (table, parallel coordinates, scatter plots) and each trial's accuracy over steps.

Everything of a trial goes into one directory of its own, OUT/tensorboard/<id>, written when the trial has ended.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ray.tune import Callback
from ray.tune.experiment import Trial
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import summary_v2 as hp
from torch.utils.tensorboard import SummaryWriter

from gdd_dist.config.settings import Config
from tune import space
from tune.record import Outcome, Record
from tune.space import Axis

METRICS = {"search/val": "val accuracy %", "search/stderr": "standard error", "search/gap": "shortcut gap"}


class Writer(Callback):
    """Writes a trial's directory as it ends."""

    def __init__(self, record: Record, axes: Sequence[Axis], config: Config) -> None:
        self._record, self._axes, self._config = record, axes, config

    def setup(self, *args: Any, **info: Any) -> None:
        """What the hparams page shows; trials that an earlier invocation ended are written again."""
        directory = self._record.out / "tensorboard"
        shutil.rmtree(directory, ignore_errors=True)
        add(directory, [hp.hparams_config_pb([_column(a) for a in self._axes], [_metric(t) for t in METRICS])])
        for outcome in self._record.outcomes().values():
            self._write(outcome)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **_info: Any) -> None:
        """Written down by the keeper just before."""
        outcome = self._record.outcomes().get(trial.config["id"])
        if outcome is not None:
            self._write(outcome)

    def _write(self, outcome: Outcome) -> None:
        directory = self._record.out / "tensorboard" / outcome.id
        if outcome.val is None or directory.exists():
            return
        settings = {**space.values(self._axes, self._config), **outcome.settings}
        add(directory, [hp.hparams_pb(settings, trial_id=outcome.id)])
        with SummaryWriter(str(directory)) as writer:
            curve = [line for line in self._record.curve(outcome.id) if line["step"] != outcome.steps]
            for line in [*curve, {"step": outcome.steps, **_numbers(outcome)}]:
                for tag in METRICS:
                    writer.add_scalar(tag, line[tag.partition("/")[2]], line["step"])


def _numbers(outcome: Outcome) -> dict[str, Any]:
    return {"val": outcome.val, "stderr": outcome.stderr, "gap": outcome.gap}


def _column(axis: Axis) -> hp.HParam:
    domain: Any = hp.Discrete(list(axis.choices)) if axis.choices else None
    if domain is None:
        low, high = (0.0 if axis.zero else axis.low), axis.high
        domain = hp.IntInterval(int(low), int(high)) if axis.type is int else hp.RealInterval(low, high)
    return hp.HParam(axis.setting, domain)


def _metric(tag: str) -> hp.Metric:
    return hp.Metric(tag, display_name=METRICS[tag])


def add(directory: Path, summaries: Sequence[Summary]) -> None:
    """Write summaries as they are."""
    with SummaryWriter(str(directory)) as writer:
        for summary in summaries:
            writer._get_file_writer().add_summary(summary)
