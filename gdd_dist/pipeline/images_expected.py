"""How many images the networks of each step forward, from the settings alone; a run estimates its remaining time by this.

The dry run counts exactly, because it tries each step. These counts need no computation, and leave out small parts.
"""

from collections.abc import Callable, Mapping, Sequence

from gdd_dist.config.steps import TABLE
from gdd_dist.evaluation import quick_students, rows, student_results
from gdd_dist.evaluation.job_images import images_forwarded
from gdd_dist.steps import gaussian
from gdd_dist.training.context import Context
from gdd_dist.training.teacher_features import images_read

DISCRIMINATED = 6
"""Forwards for each image of a step with a discriminator: two by the generator, four by itself; in matching, a teacher's is one of them."""
MATCHED = 2
"""Forwards for each image of a matching step without a discriminator: by the generator and by a teacher."""


def images_expected(ctx: Context, fps: Mapping[str, str], steps: Sequence[str]) -> dict[str, int]:
    """Return the number of images for each unfinished step of ``steps``, over all ranks. All ranks call it.

    A step that EXPECTED does not name is left out: the remaining time is then estimated without it.
    """
    todo = ctx.world.broadcast([step for step in TABLE if step in steps and not ctx.store.finished(step, fps[step])])
    return {step: EXPECTED[step](ctx, fps) for step in todo if step in EXPECTED}


def _teachers(ctx: Context, _: Mapping[str, str]) -> int:
    t, val = ctx.config.teachers, len(ctx.images("val"))
    if t.pretrained:
        return len(t.architectures) * val
    return _trainings(ctx) * (t.epochs * len(ctx.images("train")) + t.snapshots * val)


def _logits(ctx: Context, _: Mapping[str, str]) -> int:
    return _trainings(ctx) * ctx.config.teachers.snapshots * ctx.config.logits.views * len(ctx.images("train"))


def _matching(ctx: Context, _: Mapping[str, str]) -> int:
    m, beside = ctx.config.matching, 0
    if m.lambda_feature:
        pool = _trainings(ctx) * (ctx.config.teachers.snapshots if m.teachers == "all" else 1)
        beside = pool * images_read(ctx.images("train").labels) * ctx.world.size
    each = DISCRIMINATED if m.lambda_adv else MATCHED
    measured = m.steps // m.interval + (m.start == "gan")
    return each * m.steps * m.batch + measured * _measurement(ctx) + beside


def _report(ctx: Context, fps: Mapping[str, str]) -> int:
    jobs = rows.jobs(ctx.config, ctx.manifest, ctx.precision, {"data": fps["shards"], **fps})
    known = student_results.cached(ctx, jobs)
    return sum(images_forwarded(j, _trainings(ctx), ctx.manifest) for j in jobs if j.fingerprint not in known)


def _trainings(ctx: Context) -> int:
    return ctx.config.teachers.seeds * len(ctx.config.teachers.architectures)


def _measurement(ctx: Context) -> int:
    return ctx.config.matching.quick_students * sum(quick_students.forwards(ctx))


EXPECTED: dict[str, Callable[[Context, Mapping[str, str]], int]] = {
    "teachers": _teachers,
    "logits": _logits,
    "gaussian": lambda ctx, _: gaussian.candidates(ctx) * _measurement(ctx),
    "gan": lambda ctx, _: DISCRIMINATED * ctx.config.gan.steps * ctx.config.gan.batch,
    "matching": _matching,
    "report": _report,
}
