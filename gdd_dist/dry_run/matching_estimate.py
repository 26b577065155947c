"""What the dry run says of matching: the step itself, its measurements with quick students, and what is computed beside it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from gdd_dist.config.ranks import taking_part
from gdd_dist.dry_run.trial import Estimate, Training, Trial, answering, drawing, steps_done, studying
from gdd_dist.evaluation import quick_students
from gdd_dist.models.files import GENERATOR
from gdd_dist.runtime.meter import NOTHING, Cost
from gdd_dist.steps import matching
from gdd_dist.storage.store import CHECKPOINTS
from gdd_dist.training import drawing as drawn
from gdd_dist.training import sample_grid
from gdd_dist.training.classifier_fit import PREDICT_BATCH
from gdd_dist.training.context import Context
from gdd_dist.training.teacher_features import REAL, Features, images_read


def make_up_matching(trial: Trial, directory: Path) -> None:
    """Write a generator like that of gan."""
    (directory / GENERATOR).hardlink_to(trial.directories[trial.ctx.config.matching.start] / GENERATOR)


def estimate_matching(trial: Trial, work: Path) -> Estimate:
    """The cost is that of training steps, and of measurements with quick students, each with a grid of samples."""
    ctx, m = trial.ctx, trial.ctx.config.matching
    start, step = steps_done(ctx, work / CHECKPOINTS), _matching_step(trial, work)
    parts, students_of_all = measurement(trial, m.start, step.cost)
    first = max(start, int(m.start == "gaussian"))  # the step gaussian has measured its own
    left, measurements = m.steps - start, sum(s % m.interval == 0 for s in range(first, m.steps)) + 1
    turns = measurements * -(-m.quick_students // taking_part(ctx.config, "matching", ctx.world.size))
    each = students_of_all + sample_grid.forwards(ctx)
    looking, looked_at = _features(trial)
    seconds = left * step.cost.seconds + turns * sum(part.seconds for part in parts) + looking.seconds
    images = left * step.forwards + step.settling + measurements * each + looked_at
    return Estimate(start > 0, left, images, Cost.peak((step.cost, *parts, looking), seconds))


def _features(trial: Trial) -> tuple[Cost, int]:
    """Return the cost of each teacher's features of real images, on every rank, and the images that all ranks forward."""
    m, each = trial.ctx.config.matching, images_read(trial.ctx.images("train").labels)
    if not m.lambda_feature:
        return NOTHING, 0
    used = [name for last, name in trial.pool if last or m.teachers == "all"]
    parts = [trial.cost(each, REAL, answering, name) for name in used]
    seconds = sum(part.seconds for part in parts)
    return Cost.peak(parts, seconds), len(used) * each * trial.ctx.world.size


def _matching_step(trial: Trial, work: Path) -> Training:
    """Groups use the teachers in turn, so that a small batch has all architectures, like the full batch."""
    config, dirs = trial.ctx.config, trial.directories
    used = [i for i, (last, _) in enumerate(trial.pool) if last or config.matching.teachers == "all"]

    def in_turn(batch: matching.Batch) -> matching.Batch:
        turns = np.resize(used, len(batch.groups.classes))
        return batch._replace(groups=replace(batch.groups, teachers=turns).by_teacher())

    def build(small: Context) -> matching.Matching:
        pool = matching.Pool(small, dirs["teachers"], dirs["logits"])
        if config.matching.lambda_feature:  # one mean for all features of all classes takes as long
            zero = torch.zeros(small.classes, 1, device=small.device)
            pool.real = dict.fromkeys(used, Features(zero, zero.new_ones(())))
        return matching.Matching(small, work, pool, trial.inputs)

    unit = config.matching.group * len(config.teachers.architectures) * config.accumulate
    return trial.training("matching", trial.ctx.world.size, build, unit, in_turn)


def measurement(trial: Trial, step: str, beside: Cost) -> tuple[list[Cost], int]:
    """Return the costs of one quick student of ``step``'s generator, and the images that all students of a measurement forward."""
    m, name = trial.ctx.config.matching, trial.ctx.config.matching.quick_student
    trained, fresh, answered = quick_students.forwards(trial.ctx)
    parts = [
        trial.cost(trained, m.quick_batch, studying, name).beside(beside),
        trial.cost(fresh, min(drawn.DRAW_BATCH, quick_students.CHUNK * m.quick_batch), drawing, step).beside(beside),
        trial.cost(answered, PREDICT_BATCH, answering, name).beside(beside),
    ]
    return parts, m.quick_students * (trained + fresh + answered)
