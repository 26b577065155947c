"""The search in TensorBoard: the hparams page (table, parallel coordinates, scatter plots) and each trial's accuracy over steps.

Each trial has its own directory, OUT/tensorboard/<id>, which is written when the trial has ended.
"""

from __future__ import annotations

import dataclasses
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
        """Write the columns of the hparams page, and again the trials that ended in earlier invocations."""
        directory = self._record.out / "tensorboard"
        shutil.rmtree(directory, ignore_errors=True)
        metrics = [hp.Metric(tag, display_name=name) for tag, name in METRICS.items()]
        add(directory, [hp.hparams_config_pb([_column(a) for a in self._axes], metrics)])
        for outcome in self._record.outcomes().values():
            self._write(outcome)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **_info: Any) -> None:
        """Write the trial, which the keeper has recorded just before."""
        if outcome := self._record.outcomes().get(trial.config["id"]):
            self._write(outcome)

    def _write(self, outcome: Outcome) -> None:
        directory = self._record.out / "tensorboard" / outcome.id
        if outcome.val is None or directory.exists():
            return
        settings = {**space.values(self._axes, self._config), **outcome.settings}
        add(directory, [hp.hparams_pb(settings, trial_id=outcome.id)])
        with SummaryWriter(str(directory)) as writer:
            curve = [line for line in self._record.curve(outcome.id) if line["step"] != outcome.steps]
            for line in [*curve, {**dataclasses.asdict(outcome), "step": outcome.steps}]:
                for tag in METRICS:
                    writer.add_scalar(tag, line[tag.partition("/")[2]], line["step"])


def _column(axis: Axis) -> hp.HParam:
    if axis.choices:
        return hp.HParam(axis.setting, hp.Discrete(list(axis.choices)))
    low = 0.0 if axis.zero else axis.low
    if axis.type is int:
        return hp.HParam(axis.setting, hp.IntInterval(int(low), int(axis.high)))
    return hp.HParam(axis.setting, hp.RealInterval(low, axis.high))


def add(directory: Path, summaries: Sequence[Summary]) -> None:
    """Write summaries as they are."""
    with SummaryWriter(str(directory)) as writer:
        for summary in summaries:
            writer._get_file_writer().add_summary(summary)
