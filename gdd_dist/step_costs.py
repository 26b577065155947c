"""What each step costs: its true code on random weights, made-up logits and a few real images, measured by a Meter.

Seconds are those of the whole step on all ranks; memory is a rank's peak. Nothing is read from finished steps.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from pathlib import Path

from gdd_dist import matching
from gdd_dist.context import Context
from gdd_dist.fit import PREDICT_BATCH
from gdd_dist.made_up import MadeUp, report_files
from gdd_dist.pictures import GRID_CLASSES, GRID_COLUMNS
from gdd_dist.probe import Cost, Meter, peak_memory, reset_peak
from gdd_dist.quick import CHUNK, FRESH_IMAGES
from gdd_dist.rows import GENERATORS, Job
from gdd_dist.students import CHUNK_IMAGES, TEACHER_BATCH, Frozen
from gdd_dist.synthetic import DRAW_BATCH
from gdd_dist.teachers import Training
from gdd_dist.trial_steps import (
    adversaries,
    answering,
    drawing,
    gan_step,
    labelling,
    matching_step,
    painting,
    predicting,
    training,
)


class StepCosts:
    """Measures on demand; figures that several steps need are measured once. All ranks call it alike."""

    def __init__(self, ctx: Context, meter: Meter, made_up: MadeUp) -> None:
        self._ctx, self._meter, self._made_up = ctx, meter, made_up

    def _train(self, name: str, batch: int) -> Cost:
        return self._meter(training(self._ctx, name), batch)

    def _predict(self, name: str, images: int) -> tuple[float, float]:
        """(seconds of measuring a classifier on ``images``, memory)."""
        batch = min(PREDICT_BATCH, images)
        cost = self._meter(predicting(self._ctx, self._ctx.classifier(name, 0, "dry-run")), batch)
        return cost.seconds * images / batch, cost.memory

    def teachers(self, left: Sequence[tuple[Training, int]]) -> Cost:
        """``left``: trainings, and how many of their steps are done."""
        t, seconds, memory = self._ctx.config.teachers, {}, [0.0]
        val = len(self._ctx.images("val"))
        for name in dict.fromkeys(one.architecture for one, _ in left):
            step, (look, most) = self._train(name, t.batch), self._predict(name, val)
            seconds[name] = (step.seconds, look)
            memory += [step.memory, most]
        spent = []
        for one, done in left:
            step_seconds, look = seconds[one.architecture]
            marks = sum(mark > done for mark in one.snapshots)
            spent.append((one.steps - done) * step_seconds + marks * look)
        return Cost(makespan(spent, self._ctx.world.size), max(memory))

    def logits(self, images: int) -> Cost:
        """``images``: forwards that are left, of all teachers alike."""
        ctx, t, v = self._ctx, self._ctx.config.teachers, self._ctx.config.logits
        most = max(ctx.images("train").shards.shard_samples)
        batch, costs = min(v.batch, most), []
        for name in t.architectures:
            costs.append(self._meter(answering(ctx, ctx.classifier(name, 0, "dry-run").eval()), batch))
        a_batch = sum(c.seconds for c in costs) / len(costs)
        file = 2 * v.views * most * ctx.classes  # as it is filled, as a file in memory, as its bytes
        return Cost(images / batch * a_batch / ctx.world.size, max(c.memory for c in costs) + 3 * file)

    def gan(self, steps: int, grids: int) -> Cost:
        """``steps``, ``grids``: what is left of them."""
        ctx = self._ctx
        nets = adversaries(ctx)
        step = self._meter(gan_step(ctx, nets), ctx.config.gan.batch // ctx.world.size)
        grid = self._meter(painting(ctx, nets.ema), min(ctx.classes, GRID_CLASSES) * GRID_COLUMNS)
        nets.close()
        return Cost(steps * step.seconds + grids * grid.seconds, max(step.memory, grid.memory))

    def matching(self, steps: int, measurements: int, work: Path) -> Cost:
        """``steps``, ``measurements``: what is left of them."""
        ctx, m, made_up = self._ctx, self._ctx.config.matching, self._made_up
        matcher = matching.Matcher(ctx, made_up.teachers, made_up.logits)
        nets = matching.Run(ctx, work, made_up.gan).nets
        unit = m.group * len(ctx.config.teachers.architectures)
        step = self._meter(matching_step(ctx, nets, matcher), m.batch // ctx.world.size, unit)
        student = self._train(m.quick_student, m.quick_batch)
        look, memory = self._predict(m.quick_student, len(ctx.images("val")) + FRESH_IMAGES)
        batch = min(DRAW_BATCH, CHUNK * m.quick_batch)
        drawn = self._meter(drawing(ctx, nets.ema), batch)
        images = m.quick_steps * m.quick_batch + FRESH_IMAGES
        quick = m.quick_steps * student.seconds + images / batch * drawn.seconds + look
        nets.close()
        turns = -(-m.quick_students // ctx.world.size)
        most = max(step.memory, student.memory, memory, drawn.memory)
        return Cost(steps * step.seconds + measurements * turns * quick, most)

    def report(self, left: Sequence[Job], fps: Mapping[str, str]) -> tuple[Cost, dict[str, int]]:
        """``left``: students not yet trained. Returns the sizes of its files too."""
        frozen = Frozen(self._ctx, self._made_up.dirs())
        look = {name: self._predict(name, len(self._ctx.images("test"))) for name in {j.row.student: 0 for j in left}}
        steps = {key: self._train(*key) for key in dict.fromkeys((j.row.student, j.budget.batch) for j in left)}
        label, paint = Cost(0.0, 0.0), Cost(0.0, 0.0)
        if any(j.row.labels == "soft" for j in left):
            label = self._meter(labelling(self._ctx, frozen), TEACHER_BATCH)
        if any(j.row.train_on in GENERATORS for j in left):
            paint = self._meter(drawing(self._ctx, frozen.generator("gan")), min(DRAW_BATCH, CHUNK_IMAGES))
        spent = []
        for j in left:
            b, step = j.budget, steps[j.row.student, j.budget.batch]
            seconds = b.images_seen / b.batch * step.seconds + look[j.row.student][0]
            seconds += (j.row.labels == "soft") * b.images_seen / TEACHER_BATCH * label.seconds
            seconds += (j.row.train_on in GENERATORS) * b.distinct_images_seen / DRAW_BATCH * paint.seconds
            spent.append(seconds)
        reset_peak(self._ctx.device)
        files = report_files(self._ctx, self._made_up, fps)
        peaks = [float(peak_memory(self._ctx.device)), label.memory, paint.memory]
        peaks += [c.memory for c in steps.values()] + [memory for _, memory in look.values()]
        return Cost(makespan(spent, self._ctx.world.size), max(peaks)), files


def makespan(seconds: Sequence[float], ranks: int) -> float:
    """When the last rank is done, if each takes the longest job left as soon as it is free."""
    busy = [0.0] * ranks
    for job in sorted(seconds, reverse=True):
        heapq.heapreplace(busy, busy[0] + job)
    return max(busy)
