"""Step: the cache. Each teacher's logits of every view of every training image, computed once, one file per teacher and shard."""

from __future__ import annotations

import hashlib
import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gdd_dist.config.steps import Inputs
from gdd_dist.data.augment import AUGMENT_DRAWS
from gdd_dist.data.images import prefetch, to_float
from gdd_dist.data.logit_cache import MEANS, file_bytes, logit_file
from gdd_dist.data.noise import uniform
from gdd_dist.engines.precision import autocast
from gdd_dist.models.classifiers import Classifier
from gdd_dist.models.files import Teacher, read_teachers
from gdd_dist.runtime.monitor import say
from gdd_dist.storage.json_files import write_json
from gdd_dist.storage.store import Whole
from gdd_dist.training.context import Context
from sharding.errors import UserError
from sharding.files import sha256_file, write_atomic

LIST = "logits.json"


def view_draws(seed: int, view: int, samples: np.ndarray) -> np.ndarray:
    """Augmentation draws of view ``view`` of each sample, float32 [n, AUGMENT_DRAWS]: a function of (seed, view, sample)."""
    return uniform(seed, "logits/view", view, samples, AUGMENT_DRAWS)


def run(ctx: Context, work: Path, inputs: Inputs) -> dict[str, Any]:
    """Fill ``work`` with teacher-NNN/train-NNNNNN.npy, float16 [V, n, C]; the ranks share the files, whole ones are kept."""
    teachers, images = read_teachers(inputs.directories["teachers"]), ctx.images("train")
    counts, views = images.shards.shard_samples, ctx.config.logits.views
    jobs = [(t, s) for t in teachers for s in range(len(counts))]
    ctx.disks.share(work, ["*.npy", "*.jsonl"])
    whole = Whole(work, ctx.world.rank)
    todo = missing(ctx, work, [(t.index, s) for t, s in jobs], whole)
    ctx.resumed |= len(todo) < len(jobs)
    _check_space(ctx, work, sum(file_bytes(counts[s], views, ctx.classes) for _, s in todo))
    total, left = (sum(counts[s] for _, s in some) for some in (jobs, todo))
    monitor = ctx.monitor("logits", work, total, start=total - left, unit="image")
    net: tuple[int, Classifier] | None = None
    mine = 0

    def tick(done: int) -> None:
        # As if all ranks were as far as this one.
        monitor.advance(min(total - left + (mine + done) * ctx.world.size, total))

    for job in ctx.world.queue(len(todo)):
        index, shard = todo[job]
        if net is None or net[0] != index:
            net = (index, ctx.teacher(teachers[index]))
        _expect(ctx, [s for _, s in todo[job :: ctx.world.size]])
        path = logit_file(work, index, shard)
        whole.note(path, _write(path, answer(ctx, net[1], shard, tick)))
        mine += counts[shard]
    ctx.world.barrier()
    monitor.advance(total)
    ctx.disks.share(work, ["*.npy", "*.jsonl"])
    if ctx.world.is_main:
        _finish(ctx, work, teachers, jobs, whole, monitor.histogram)
    monitor.close()
    return {"views": views, "teachers": len(teachers)}


def missing(ctx: Context, work: Path, jobs: list[tuple[int, int]], whole: Whole) -> list[tuple[int, int]]:
    """Those of ``jobs`` (teacher, shard) whose file is not there as it was written; the ranks share the hashing."""
    known, mine = whole.known(), []
    for n in range(ctx.world.rank, len(jobs), ctx.world.size):
        ctx.world.check_stop()
        path = logit_file(work, *jobs[n])
        noted = known.get(str(path.relative_to(work)))
        if noted is None or not path.exists():
            mine.append(n)
        elif (path.stat().st_size, sha256_file(path)) not in noted:
            say(f"logits: {path} is damaged (sha256 differs); it is computed again")
            mine.append(n)
    return [jobs[n] for n in sorted(n for part in ctx.world.gather(mine) for n in part)]


def _check_space(ctx: Context, work: Path, needed: int) -> None:
    """Say how many bytes come, and refuse when the disk lacks them (rank 0 looks, all hear it)."""
    if ctx.world.is_main:
        free = shutil.disk_usage(work).free
        say(f"logits: {needed / 1e6:.1f} MB to write, {free / 1e6:.0f} MB free in {work.parent}")
        if needed > free:
            raise UserError(
                f"the logits need {needed / 1e6:.0f} MB but {work.parent} has {free / 1e6:.0f} MB; "
                "free some space, point --store elsewhere, or lower --logits.views or --teachers.snapshots"
            )


def _expect(ctx: Context, shards: list[int]) -> None:
    """Say that these shards come, whole, one after another."""
    images, size = ctx.images("train"), ctx.config.logits.batch
    starts = np.cumsum([0, *images.shards.shard_samples])
    reads = [s for s in shards for _ in range(-(-images.shards.shard_samples[s] // size))]
    images.expect(lambda read: starts[reads[read]][None], 0, len(reads))


@torch.no_grad()
def answer(ctx: Context, net: Classifier, shard: int, tick: Callable[[int], None]) -> np.ndarray:
    """One teacher's logits of one shard: float16 [V, n, C], rows in index order; ``tick``: images done."""
    images, seed = ctx.images("train"), ctx.config.step_seed("logits")
    starts = np.concatenate([[0], np.cumsum(images.shards.shard_samples)])
    rows = np.arange(starts[shard], starts[shard + 1])
    views, size = ctx.config.logits.views, ctx.config.logits.batch
    out = np.empty((views, len(rows), ctx.classes), dtype=np.float16)

    def read(number: int) -> tuple[torch.Tensor, ...]:
        part = rows[number * size : (number + 1) * size]
        draws = (torch.from_numpy(view_draws(seed, view, part)) for view in range(1, views))
        return ctx.sent((images.read(part), *draws))

    done = 0
    for pixels, *draws in prefetch(read, 0, -(-len(rows) // size), ctx.config.loader.prefetch):
        ctx.world.check_stop()
        plain = to_float(pixels, ctx.device)
        answers = []
        for of_view in (None, *draws):
            x = plain if of_view is None else ctx.augment(plain, of_view)
            with autocast(ctx.device, ctx.precision):
                answers.append(net(x).float().clamp(-65504, 65504))
        out[:, done : done + len(plain)] = torch.stack(answers).cpu().numpy()
        done += len(plain)
        tick(done)
    return out


def _write(path: Path, logits: np.ndarray) -> bytes:
    path.parent.mkdir(exist_ok=True)
    buffer = io.BytesIO()
    np.save(buffer, logits, allow_pickle=False)
    write_atomic(path, buffer.getvalue())
    return buffer.getvalue()


def _finish(
    ctx: Context, work: Path, teachers: list[Teacher], jobs: list[tuple[Teacher, int]], whole: Whole, histogram: Any
) -> None:
    """Class means and the list of files with their sha256."""
    labels, counts = ctx.images("train").labels, ctx.images("train").shards.shard_samples
    starts, known = np.concatenate([[0], np.cumsum(counts)]), whole.known()
    totals = np.zeros((len(teachers), ctx.config.logits.views, ctx.classes, ctx.classes))
    files = []
    for teacher, shard in jobs:
        path = logit_file(work, teacher.index, shard)
        data, name = path.read_bytes(), str(path.relative_to(work))
        files.append({"file": name, "sha256": hashlib.sha256(data).hexdigest()})
        if (len(data), files[-1]["sha256"]) not in known[name]:
            raise UserError(f"{path} is damaged (sha256 differs); run the same command again to compute it anew")
        logits = np.load(io.BytesIO(data), allow_pickle=False)
        if shard == 0:
            histogram("teacher_logits", logits[0].astype(np.float32), teacher.index)
        for c in range(ctx.classes):
            totals[teacher.index, :, c] += logits[:, labels[starts[shard] : starts[shard + 1]] == c].sum(
                1, dtype=np.float64
            )
    per_class = np.maximum(np.bincount(labels, minlength=ctx.classes), 1)
    _write(work / MEANS, (totals / per_class[:, None]).astype(np.float32))
    write_json(
        work / LIST,
        {
            "format": "gdd-logits/1",
            "views": ctx.config.logits.views,
            "dtype": "float16",
            "axes": ["view", "sample", "class"],
            "files": files,
        },
    )
