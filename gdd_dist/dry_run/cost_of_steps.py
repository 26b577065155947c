"""What each step costs: its true code on random weights, made-up logits and a few real images, measured by a Meter.

Seconds are those of the whole step on all ranks; memory is a rank's peak. Nothing is read from finished steps.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Mapping, Sequence
from pathlib import Path

from gdd_dist.dry_run.meter import Cost, Curve, Meter, peak_memory, reset_peak
from gdd_dist.dry_run.placeholder_inputs import MadeUp, report_files
from gdd_dist.dry_run.sample_steps import (
    adversaries,
    answering,
    drawing,
    gan_step,
    labelling,
    matching_step,
    painting,
    small_group,
    teaching,
    training,
)
from gdd_dist.dry_run.work_left import quick_looks
from gdd_dist.evaluation.quick_students import CHUNK, FRESH_IMAGES
from gdd_dist.evaluation.rows import GENERATORS, Job
from gdd_dist.evaluation.students import CHUNK_IMAGES, Frozen
from gdd_dist.steps import matching
from gdd_dist.steps.teacher_pool import Training
from gdd_dist.training.classifier_fit import PREDICT_BATCH
from gdd_dist.training.context import Context
from gdd_dist.training.drawing import DRAW_BATCH
from gdd_dist.training.sample_grid import GRID_CLASSES, GRID_COLUMNS
from gdd_dist.training.soft_labels import BATCH as LABEL_BATCH


class StepCosts:
    """Measures on demand. All ranks call it alike."""

    def __init__(self, ctx: Context, meter: Meter, made_up: MadeUp) -> None:
        self._ctx, self._meter, self._made_up = ctx, meter, made_up
        self._answers: dict[str, Curve] = {}

    def _train(self, name: str, batch: int) -> Curve:
        return self._meter(training(self._ctx, name), batch)

    def _answer(self, name: str) -> Curve:
        """A teacher's forward, by batch; measured once."""
        if name not in self._answers:
            largest = max(PREDICT_BATCH, self._ctx.config.logits.batch)
            net = self._ctx.classifier(name, 0, "dry-run")
            self._answers[name] = self._meter(answering(self._ctx, net), min(largest, len(self._ctx.images("train"))))
        return self._answers[name]

    def teachers(self, left: Sequence[tuple[Training, int]]) -> Cost:
        """``left``: trainings, and how many of their steps are done."""
        t, costs, val = self._ctx.config.teachers, {}, len(self._ctx.images("val"))
        if t.pretrained:  # only measured on val
            looks = [in_batches(self._answer(name), val, PREDICT_BATCH) for name in t.architectures]
            return Cost.peak(looks, makespan([look.seconds for look in looks], self._ctx.world.size))
        share = t.batch // t.ranks_per_teacher
        for name in dict.fromkeys(one.architecture for one, _ in left):
            with teaching(self._ctx, name) as prepare:
                cost = self._meter(prepare, share, 2 * t.accumulate).at(share)  # two: fewer have no batch statistics
            costs[name] = cost, in_batches(self._answer(name), val, PREDICT_BATCH)
        spent = []
        for one, done in left:
            step, look = costs[one.architecture]
            marks = sum(mark > done for mark in one.snapshots)
            spent.append((one.steps - done) * step.seconds + marks * look.seconds)
        return Cost.peak((c for pair in costs.values() for c in pair), makespan(spent, self._ctx.team.count))

    def logits(self, images: int) -> Cost:
        """``images``: forwards that are left, of all teachers alike."""
        ctx, names, views = self._ctx, self._ctx.config.teachers.architectures, self._ctx.config.logits.views
        most = max(ctx.images("train").shards.shard_samples)
        costs = [
            in_batches(self._answer(name), images / len(names), min(ctx.config.logits.batch, most)) for name in names
        ]
        file = 2 * views * most * ctx.classes
        copies = 3  # as it is filled, as a file in memory, as the bytes of that file
        most_of_all = Cost.peak(costs, sum(c.seconds for c in costs) / ctx.world.size)
        return dataclasses.replace(most_of_all, memory=most_of_all.memory + copies * file)

    def gan(self, steps: int, grids: int) -> Cost:
        """``steps``, ``grids``: what is left of them."""
        ctx = self._ctx
        nets, share = adversaries(ctx), ctx.config.gan.batch // ctx.world.size
        step = self._meter(gan_step(ctx, nets), share, ctx.config.accumulate).at(share)
        images = min(ctx.classes, GRID_CLASSES) * GRID_COLUMNS
        grid = self._meter(painting(ctx, nets.ema), images).at(images)
        nets.close()
        return Cost.peak((step, grid), steps * step.seconds + grids * grid.seconds)

    def matching(self, steps: int, measurements: int, work: Path) -> Cost:
        """``steps``, ``measurements``: what is left of them."""
        ctx, m, made_up = self._ctx, self._ctx.config.matching, self._made_up
        matcher = matching.Pool(ctx, made_up.teachers, made_up.logits)
        nets = matching.Matching(ctx, work, matcher, made_up.gan).nets
        share = m.batch // ctx.world.size
        unit = small_group(m.group) * len(ctx.config.teachers.architectures) * ctx.config.accumulate
        step = self._meter(matching_step(ctx, nets, matcher), share, unit).at(share)
        student = self._train(m.quick_student, m.quick_batch).at(m.quick_batch)
        net = ctx.classifier(m.quick_student, 0, "dry-run")
        look = in_batches(self._meter(answering(ctx, net), PREDICT_BATCH), quick_looks(ctx), PREDICT_BATCH)
        batch = min(DRAW_BATCH, CHUNK * m.quick_batch)
        drawn = in_batches(
            self._meter(drawing(ctx, nets.ema), batch), m.quick_steps * m.quick_batch + FRESH_IMAGES, batch
        )
        nets.close()
        turns = -(-m.quick_students // ctx.world.size)
        quick = turns * (m.quick_steps * student.seconds + drawn.seconds + look.seconds)
        return Cost.peak((step, student, drawn, look), steps * step.seconds + measurements * quick)

    def report(self, left: Sequence[Job], fps: Mapping[str, str]) -> tuple[Cost, dict[str, int]]:
        """``left``: students not yet trained. Returns the sizes of its files too."""
        ctx = self._ctx
        frozen, test = Frozen(ctx, self._made_up.dirs()), len(ctx.images("test"))
        label = paint = Curve([(1, Cost(0.0, 0.0))])
        if any(j.row.labels == "soft" for j in left):
            label = self._meter(labelling(ctx, frozen), LABEL_BATCH)
        if any(j.row.train_on in GENERATORS for j in left):
            paint = self._meter(drawing(ctx, frozen.generator("gan")), min(DRAW_BATCH, CHUNK_IMAGES))
        largest: dict[str, int] = {}
        for j in left:
            largest[j.row.student] = max(largest.get(j.row.student, 0), j.budget.batch)
        trained = {name: self._train(name, batch) for name, batch in largest.items()}
        spent, costs = [], []
        for j in left:
            b = j.budget
            parts = [in_batches(trained[j.row.student], b.images_seen, b.batch)]
            parts.append(in_batches(self._answer(j.row.student), test, PREDICT_BATCH))
            if j.row.labels == "soft":
                parts.append(in_batches(label, b.images_seen, LABEL_BATCH))
            if j.row.train_on in GENERATORS:
                parts.append(in_batches(paint, b.distinct_images_seen, min(DRAW_BATCH, CHUNK_IMAGES)))
            spent.append(sum(c.seconds for c in parts))
            costs += parts
        reset_peak(ctx.device)
        files = report_files(ctx, self._made_up, fps)
        costs.append(Cost(0.0, peak_memory(ctx.device)))
        return Cost.peak(costs, makespan(spent, ctx.world.size)), files


def in_batches(curve: Curve, images: float, batch: int) -> Cost:
    """The cost of ``images`` in batches: all their seconds, the peak of one."""
    if not images:
        return Cost(0.0, 0.0)
    one = curve.at(min(batch, images))
    return dataclasses.replace(one, seconds=one.seconds * images / min(batch, images))


def makespan(seconds: Sequence[float], ranks: int) -> float:
    """When the last rank is done, if each takes the longest job left as soon as it is free."""
    busy = [0.0] * ranks
    for job in sorted(seconds, reverse=True):
        heapq.heapreplace(busy, busy[0] + job)
    return max(busy)
