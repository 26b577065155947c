"""What each step would need, from the settings and what an interrupted run kept; and made-up files like its outputs.

`ESTIMATES` holds one entry for each step of the table; the rest of the dry run names no step.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gdd_dist.config.ranks import taking_part
from gdd_dist.data.logit_cache import MEANS, logit_file
from gdd_dist.dry_run.trial import (
    SILENT,
    Estimate,
    Training,
    Trial,
    answering,
    condensing,
    drawing,
    labelling,
    smaller,
    steps_done,
    studying,
)
from gdd_dist.evaluation import job_images, quick_students, rows, student_results, students
from gdd_dist.evaluation.kinds import GENERATORS
from gdd_dist.models.files import GENERATOR, TEACHERS, save_network
from gdd_dist.models.gaussian import LinearGenerator
from gdd_dist.pipeline.run import provenance
from gdd_dist.reporting import diagnostics
from gdd_dist.runtime.meter import NOTHING, Cost
from gdd_dist.steps import gan, gaussian, logits, matching, report, teacher_pool, teachers
from gdd_dist.storage.json_files import ALONE, read_json, write_json
from gdd_dist.storage.store import CHECKPOINTS
from gdd_dist.training import condense, sample_grid, soft_labels
from gdd_dist.training import drawing as drawn
from gdd_dist.training.classifier_fit import PREDICT_BATCH
from gdd_dist.training.context import Context, train_order
from gdd_dist.training.gaussian_fit import CHOICE
from gdd_dist.training.teacher_features import REAL, Features, images_read

HASH = "0" * 64


def make_up_teachers(trial: Trial, directory: Path) -> None:
    """Write one network for each architecture, shared by its teachers. Last snapshots come first, architectures in turn."""
    ctx, records, first = trial.ctx, list[dict[str, Any]](), dict[str, Path]()
    for number, (last, name) in enumerate(trial.pool):
        path = directory / f"teacher-{number:03d}.safetensors"
        if first.setdefault(name, path) != path:
            path.hardlink_to(first[name])
        else:
            meta = {"format": "gdd-classifier/1", "architecture": name, "data": ctx.manifest.fingerprint}
            save_network(path, ctx.classifier(name, 0, "dry-run"), meta)
        kept = {"seed": 0, "step": 10000, "snapshot": 0, "last": last, "val_accuracy": 61.25}
        records.append({"file": path.name, "bytes": 100000, "sha256": HASH, "architecture": name, **kept})
    write_json(directory / TEACHERS, {"format": "gdd-teachers/1", "teachers": records})


def estimate_teachers(trial: Trial, work: Path) -> Estimate:
    """Each training forwards a batch per step, and val for each snapshot; pretrained teachers are only measured on val."""
    ctx, t, val, one_of = trial.ctx, trial.ctx.config.teachers, len(trial.ctx.images("val")), teacher_pool.Training
    if t.pretrained:
        trainings = [one_of(i, name, i, 0, (1,)) for i, name in enumerate(t.architectures)]
    else:
        per_epoch = train_order(ctx.config, "teachers", trial.shards, "teacher").steps_per_epoch
        trainings = teacher_pool.pool(ctx.config, per_epoch)
    paths = {one: teacher_pool.record_path(work, one) for one in trainings}
    left = [(one, steps_done(ctx, path.with_suffix(""))) for one, path in paths.items() if not path.exists()]

    def step_of(name: str) -> Training:
        one, unit = one_of(0, name, 0, 1, (1,)), 2 * t.accumulate  # batch normalization needs two images
        return trial.training(
            "teachers", t.ranks_per_teacher, lambda small: teachers.Pupil(small, one, work, SILENT, 0), unit
        )

    looks = {one.architecture: trial.cost(val, PREDICT_BATCH, answering, one.architecture) for one, _ in left}
    steps = {name: Training() if t.pretrained else step_of(name) for name in looks}
    spent, images = [], 0
    for one, done in left:
        step, marks = steps[one.architecture], sum(mark > done for mark in one.snapshots)
        spent.append((one.steps - done) * step.cost.seconds + marks * looks[one.architecture].seconds)
        images += (one.steps - done) * step.forwards + step.settling + marks * val
    costs = [*(step.cost for step in steps.values()), *looks.values()]
    resumes, todo = len(left) < len(trainings) or any(done for _, done in left), sum(o.steps - done for o, done in left)
    return Estimate(resumes, todo, images, Cost.peak(costs, makespan(spent, ctx.team.count)))


def make_up_logits(trial: Trial, directory: Path) -> None:
    """Write sparse files of zeros, which take no space on disk."""
    views, classes, create, listed = trial.ctx.config.logits.views, trial.ctx.classes, np.lib.format.open_memmap, []
    for i, (s, n) in product(range(len(trial.pool)), enumerate(trial.shards)):
        path = logit_file(directory, i, s)
        path.parent.mkdir(exist_ok=True)
        create(path, "w+", np.float16, (views, n, classes))
        listed.append({"file": str(path.relative_to(directory)), "sha256": HASH})
    create(directory / MEANS, "w+", np.float32, (len(trial.pool), views, classes, classes))
    write_json(directory / logits.LIST, {"files": listed})


def estimate_logits(trial: Trial, work: Path) -> Estimate:
    """Each file needs every view of a shard's samples."""
    ctx, views, most = trial.ctx, trial.ctx.config.logits.views, max(trial.shards)
    files = list(product(range(len(trial.pool)), enumerate(trial.shards)))
    todo = [n for i, (s, n) in files if not logit_file(work, i, s).exists()]
    images, names = views * sum(todo), ctx.config.teachers.architectures
    batch = min(ctx.config.logits.batch, most)
    costs = [trial.cost(images // len(names), batch, answering, name) for name in names]
    cost = Cost.peak(costs, sum(c.seconds for c in costs) / ctx.world.size)
    copies = 3  # of each file: the array, the file in memory, and the bytes of that file
    cost = replace(cost, memory=cost.memory + copies * 2 * views * most * ctx.classes)
    return Estimate(len(todo) < len(files), 0, images, cost)


def make_up_gaussian(trial: Trial, directory: Path) -> None:
    """Write the largest candidate, with all numbers zero."""
    ctx, k = trial.ctx, max(gaussian.components(trial.ctx))
    shape: dict[str, Any] = {"classes": ctx.classes, "channels": ctx.manifest.channels, "size": ctx.manifest.height}
    net = LinearGenerator(**shape, latent=k, dtype=ctx.config.gaussian.dtype)
    save_network(directory / GENERATOR, net, ctx.generator_meta(net, provenance(ctx, trial.fps)))
    found = [{"components": k, "spread": 1.0, "step": 0, "val": 61.25, "stderr": 1.25, "gap": 1.25}]
    write_json(directory / CHOICE, {"format": "gdd-gaussian/1", "candidates": found * gaussian.candidates(ctx)})


def estimate_gaussian(trial: Trial, work: Path) -> Estimate:
    """Each candidate is measured with quick students; the cost of reading train twice is small and left out."""
    ctx, total = trial.ctx, gaussian.candidates(trial.ctx)
    left = total - len(list((work / CHECKPOINTS).glob("candidate-*.json")))
    parts, each = measurement(trial, "gaussian", NOTHING)
    turns = left * -(-ctx.config.matching.quick_students // ctx.world.size)
    cost = Cost.peak(parts, turns * sum(part.seconds for part in parts))
    return Estimate(left < total, 0, left * each + sample_grid.forwards(ctx), cost)


def make_up_gan(trial: Trial, directory: Path) -> None:
    """Write both networks after one step, so that the optimizers have a state."""
    ctx, ranks = trial.ctx, trial.ctx.world.size
    trainee = gan.GanTraining(smaller(ctx, "gan", ctx.config.accumulate * ranks, ranks), directory, trial.inputs)
    trainee.train(0, trainee.read(0))
    ema = trainee.nets.ema
    save_network(directory / GENERATOR, ema, ctx.generator_meta(ema, provenance(ctx, trial.fps)))
    trainee.nets.save_discriminator(directory, write=True)
    trainee.close()


def estimate_gan(trial: Trial, work: Path) -> Estimate:
    """The cost is that of training steps and of grids of samples."""
    ctx, g, grid = trial.ctx, trial.ctx.config.gan, sample_grid.forwards(trial.ctx)
    start, unit = steps_done(ctx, work / CHECKPOINTS), ctx.config.accumulate
    step = trial.training("gan", ctx.world.size, lambda small: gan.GanTraining(small, work, trial.inputs), unit)
    left, grids = g.steps - start, sum(gan.shows_grid(g, s) for s in range(start, g.steps))
    painting = trial.cost(grid, grid, drawing, "gan").beside(step.cost)
    cost = Cost.peak((step.cost, painting), left * step.cost.seconds + grids * painting.seconds)
    return Estimate(start > 0, left, left * step.forwards + step.settling + grids * grid, cost)


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


def make_up_report(trial: Trial, directory: Path) -> None:
    """Write one file as large as all files of a report."""
    (directory / "report").write_bytes(bytes(report.bytes_needed(trial.ctx)))


def estimate_report(trial: Trial, work: Path) -> Estimate:
    """The cost is that of students that no earlier run has trained; drawing the images of the pictures is left out.

    Whether matching will keep another step's generator, whose students then need no training of their own, is not known before.
    """
    ctx, t, test = trial.ctx, trial.ctx.config.teachers, len(trial.ctx.images("test"))
    jobs = rows.jobs(ctx.config, ctx.manifest, ctx.precision, {"data": trial.fps["shards"], **trial.fps})
    known = student_results.cached(ctx, jobs)
    left = [j for j in jobs if j.fingerprint not in known]
    parts = [_student(trial, j, test) for j in left]
    seconds = makespan([sum(part.seconds for part in own) for own in parts], ctx.world.size)
    cost = Cost.peak([Cost(0.0, trial.meter.base), *(part for own in parts for part in own)], seconds)
    images = sum(job_images.images_forwarded(j, t.seeds * len(t.architectures), ctx.manifest) for j in left)
    images += 2 * min(ctx.classes, report.SAMPLE_CLASSES) * report.SAMPLE_COLUMNS + diagnostics.FORWARDS
    note = work / CHECKPOINTS / "start.json"
    resumes = note.exists() and len(known) > read_json(note, lambda found: int(found["students"]), ALONE)
    return Estimate(resumes, sum(j.budget.optimizer_steps for j in left), images, cost)


def _student(trial: Trial, job: rows.Job, test: int) -> list[Cost]:
    """Return the costs of a student; the frozen networks that it learns from stay in memory."""
    b, row, draw = job.budget, job.row, NOTHING
    answered = (b.images_seen if row.labels == "soft" else 0) + job_images.images_chosen(job)
    answered += job_images.images_compared(job, trial.ctx.manifest)
    label = trial.cost(answered, soft_labels.BATCH, labelling)
    if row.train_on in GENERATORS:
        batch = min(drawn.DRAW_BATCH, students.CHUNK_IMAGES)
        draw = trial.cost(job_images.images_drawn(job), batch, drawing, "gan")
    moved = trial.cost(job_images.images_condensed(job, trial.ctx.manifest), condense.PART, condensing)
    own = [
        trial.cost(b.images_seen, b.batch, studying, row.student),
        trial.cost(test, PREDICT_BATCH, answering, row.student),
    ]
    return [label, draw, moved, *(part.beside(label).beside(draw) for part in own)]


ESTIMATES: dict[str, tuple[Callable[[Trial, Path], None], Callable[[Trial, Path], Estimate]]] = {
    "teachers": (make_up_teachers, estimate_teachers),
    "logits": (make_up_logits, estimate_logits),
    "gaussian": (make_up_gaussian, estimate_gaussian),
    "gan": (make_up_gan, estimate_gan),
    "matching": (make_up_matching, estimate_matching),
    "report": (make_up_report, estimate_report),
}
"""Step → (function that writes files like the step's outputs into a directory: true names, formats and sizes, but made-up values;
function that estimates what is left of the step, given its working directory).
"""


def makespan(seconds: Sequence[float], ranks: int) -> float:
    """Return the time at which the last rank finishes, if each free rank takes the longest job left."""
    busy = [0.0] * ranks
    for job in sorted(seconds, reverse=True):
        heapq.heapreplace(busy, busy[0] + job)
    return max(busy)
