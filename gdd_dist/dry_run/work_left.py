"""What is left of each step: optimizer steps and images forwarded, from settings, manifest and what an interrupted run kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gdd_dist.data.logit_cache import logit_file
from gdd_dist.evaluation.quick_students import FRESH_IMAGES, measured_after
from gdd_dist.evaluation.rows import Job, images_forwarded, jobs
from gdd_dist.evaluation.student_results import cached
from gdd_dist.reporting import diagnostics
from gdd_dist.steps import gan, report
from gdd_dist.steps.teacher_pool import Training, pool, record_path
from gdd_dist.storage.json_files import read_json
from gdd_dist.storage.store import CHECKPOINTS
from gdd_dist.training.context import Context, train_order
from gdd_dist.training.sample_grid import GRID_CLASSES, GRID_COLUMNS

GAN_FORWARDS, ADVERSARIAL_FORWARDS = 6, 4
"""Forwards of an image a step of the gan: generator twice, discriminator four times (which is what matching's adversarial term takes)."""
SETTLING_FORWARDS = 2
"""Images that a rank forwards as an engine settles the order of its buckets, where there are several ranks."""


@dataclass(frozen=True)
class Left:
    """What is left of a step. ``resumes``: a part of it is done; ``steps``: optimizer steps; ``images``: forwards."""

    resumes: bool
    steps: int
    images: int


def steps_done(ctx: Context, directory: Path) -> int:
    """The step that a checkpoint lets a loop go on from."""
    found = ctx.checkpoints(directory).load()
    return 0 if found is None else found[0]


def trainings_left(ctx: Context, work: Path) -> list[tuple[Training, int]]:
    """Trainings that are not done, and how many steps of each are."""
    samples = ctx.images("train").shards.shard_samples
    left: list[tuple[Training, int]] = []
    if ctx.config.teachers.pretrained:
        return left
    for one in pool(ctx.config, train_order(ctx.config, "teachers", samples, "teacher").steps_per_epoch):
        record = record_path(work, one)
        if not record.exists():
            left.append((one, steps_done(ctx, record.with_suffix(""))))
    return left


def teachers_left(ctx: Context, left: list[tuple[Training, int]]) -> Left:
    """Each step forwards a batch, each snapshot val; a team's engine settles first."""
    t, val = ctx.config.teachers, len(ctx.images("val"))
    if t.pretrained:
        return Left(False, 0, len(t.architectures) * val)
    steps = sum(one.steps - done for one, done in left)
    snapshots = sum(mark > done for one, done in left for mark in one.snapshots)
    resumes = len(left) < t.seeds * len(t.architectures) or any(done for _, done in left)
    images = steps * t.batch + snapshots * val + len(left) * settling(t.ranks_per_teacher)
    return Left(resumes, steps, images)


def logits_left(ctx: Context, work: Path, pool: int) -> Left:
    """Each file takes every view of a shard's samples."""
    counts = ctx.images("train").shards.shard_samples
    todo = [n for t in range(pool) for s, n in enumerate(counts) if not logit_file(work, t, s).exists()]
    return Left(len(todo) < pool * len(counts), 0, ctx.config.logits.views * sum(todo))


def gan_left(ctx: Context, work: Path) -> tuple[Left, int]:
    """What is left, and how many grids of samples of it."""
    g, start = ctx.config.gan, steps_done(ctx, work / CHECKPOINTS)
    grids = sum(gan.shows_grid(g, s) for s in range(start, g.steps))
    images = (g.steps - start) * GAN_FORWARDS * g.batch + grids * grid_images(ctx) + 2 * settling(ctx.world.size)
    return Left(start > 0, g.steps - start, images), grids


def matching_left(ctx: Context, work: Path) -> tuple[Left, int]:
    """What is left, and how many measurements of it. A step forwards its batch through generator, teachers and discriminator."""
    m, start = ctx.config.matching, steps_done(ctx, work / CHECKPOINTS)
    measurements = sum(s % m.interval == 0 for s in range(start, m.steps)) + 1
    quick = (
        2 * m.quick_steps * m.quick_batch
        + 2 * FRESH_IMAGES
        + len(measured_after(m.quick_steps)) * len(ctx.images("val"))
    )
    images = (m.steps - start) * (2 + (ADVERSARIAL_FORWARDS if m.lambda_adv else 0)) * m.batch
    images += measurements * (m.quick_students * quick + grid_images(ctx)) + 2 * settling(ctx.world.size)
    return Left(start > 0, m.steps - start, images), measurements


def quick_looks(ctx: Context) -> int:
    """Images that a quick student is measured on, fresh ones included."""
    return FRESH_IMAGES + len(measured_after(ctx.config.matching.quick_steps)) * len(ctx.images("val"))


def report_left(ctx: Context, work: Path, fps: Mapping[str, str]) -> tuple[Left, list[Job]]:
    """What is left, and its students. The pictures draw a few images from both generators."""
    students = jobs(ctx.config, ctx.manifest, ctx.precision, {"data": fps["shards"], **fps})
    known = cached(ctx, students)
    left = [j for j in students if j.fingerprint not in known]
    last, test = ctx.config.teachers.seeds * len(ctx.config.teachers.architectures), len(ctx.images("test"))
    images = sum(images_forwarded(j, last, test) for j in left)
    images += 2 * min(ctx.classes, report.SAMPLE_CLASSES) * report.SAMPLE_COLUMNS + diagnostics.forwards(ctx)
    note = work / CHECKPOINTS / "start.json"
    resumes = note.exists() and len(known) > read_json(note)["students"]
    return Left(resumes, sum(j.budget.optimizer_steps for j in left), images), left


def settling(ranks: int) -> int:
    """Images that one engine of so many ranks forwards before the first step."""
    return SETTLING_FORWARDS * ranks if ranks > 1 else 0


def grid_images(ctx: Context) -> int:
    """Images of a grid of samples."""
    return min(ctx.classes, GRID_CLASSES) * GRID_COLUMNS
