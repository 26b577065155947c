"""Step: the cache of logits. Each teacher's logits of every view of every training image, one file per teacher and shard."""

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
from sharding.files import write_atomic

LIST = "logits.json"


def view_draws(seed: int, view: int, samples: np.ndarray) -> np.ndarray:
    """Return the augmentation draws of a view of each sample, float32 [n, AUGMENT_DRAWS]: a function of (seed, view, sample)."""
    return uniform(seed, "logits/view", view, samples, AUGMENT_DRAWS)


def run(ctx: Context, work: Path, inputs: Inputs) -> dict[str, Any]:
    """Write teacher-NNN/train-NNNNNN.npy, float16 [V, n, C], into ``work``; ranks share the files, and intact ones are kept."""
    teachers, images = read_teachers(inputs.directories["teachers"]), ctx.images("train")
    counts, views = images.shards.shard_samples, ctx.config.logits.views
    jobs = [(t, s) for t in teachers for s in range(len(counts))]
    ctx.disks.share(work, ["*.npy", "*.jsonl"])
    whole, sums = Whole(work, ctx.world.rank), Sums(ctx, len(teachers))
    todo = missing(ctx, work, [(t.index, s) for t, s in jobs], whole, sums)
    ctx.resumed |= len(todo) < len(jobs)
    _check_space(ctx, work, sum(file_bytes(counts[s], views, ctx.classes) for _, s in todo))
    total, left = (sum(counts[s] for _, s in some) for some in (jobs, todo))
    monitor = ctx.monitor("logits", work, total, start=total - left, unit="image")
    net: tuple[int, Classifier] | None = None
    mine = 0

    def tick(done: int) -> None:
        # An estimate that assumes equal progress on all ranks.
        monitor.advance(min(total - left + (mine + done) * ctx.world.size, total))

    for job in ctx.world.queue(len(todo)):
        index, shard = todo[job]
        if net is None or net[0] != index:
            net = (index, ctx.teacher(teachers[index]))
        _expect(ctx, [s for _, s in todo[job :: ctx.world.size]])
        path, logits = logit_file(work, index, shard), answer(ctx, net[1], shard, tick)
        whole.note(path, _write(path, logits))
        sums.add(index, shard, logits)
        mine += counts[shard]
    ctx.world.barrier()
    monitor.advance(total)
    ctx.disks.share(work, ["*.npy", "*.jsonl"])
    means = sums.means()
    if ctx.world.is_main:
        for t in teachers:
            first = np.load(logit_file(work, t.index, 0), allow_pickle=False)[0]
            monitor.histogram("teacher_logits", first.astype(np.float32), t.index)
        _write(work / MEANS, means)
        _list(ctx, work, jobs, whole)
    monitor.close()
    return {"views": views, "teachers": len(teachers)}


class Sums:
    """Sums of logits by class; each file is added by the rank that has it in memory.

    A float64 sum of float16 numbers is exact, for up to 8,192 of the largest and millions of usual ones, so neither the order nor
    the number of ranks changes a bit.
    """

    def __init__(self, ctx: Context, teachers: int) -> None:
        self._ctx, self._of = ctx, dict[int, np.ndarray]()
        self._teachers, self._shape = teachers, (ctx.config.logits.views, ctx.classes, ctx.classes)
        self._starts = np.concatenate([[0], np.cumsum(ctx.images("train").shards.shard_samples)])

    def add(self, teacher: int, shard: int, logits: np.ndarray) -> None:
        """Add a file's logits, float16 [V, n, C]."""
        labels = self._ctx.images("train").labels[self._starts[shard] : self._starts[shard + 1]]
        total = self._of.setdefault(teacher, np.zeros(self._shape))
        for c in np.unique(labels):
            total[:, c] += logits[:, labels == c].sum(1, dtype=np.float64)

    def means(self) -> np.ndarray:
        """Return the mean of each class over all files, float32 [T, V, classes, C], on rank 0. All ranks call it."""
        counts = np.maximum(np.bincount(self._ctx.images("train").labels, minlength=self._ctx.classes), 1)
        out = np.empty((self._teachers, *self._shape), dtype=np.float32)
        for teacher in range(self._teachers):
            total = self._of.pop(teacher, None)
            whole = self._ctx.world.total(torch.from_numpy(np.zeros(self._shape) if total is None else total))
            out[teacher] = whole.numpy() / counts[:, None]
        return out


def missing(ctx: Context, work: Path, jobs: list[tuple[int, int]], whole: Whole, sums: Sums) -> list[tuple[int, int]]:
    """Return the ``jobs`` (teacher, shard) whose file is missing or damaged; ranks share the reading, and sum the intact files."""
    known, mine = whole.known(), []
    for n in range(ctx.world.rank, len(jobs), ctx.world.size):
        ctx.world.check_stop()
        path = logit_file(work, *jobs[n])
        noted = known.get(str(path.relative_to(work)))
        if noted is None or not path.exists():
            mine.append(n)
        elif (len(data := path.read_bytes()), hashlib.sha256(data).hexdigest()) not in noted:
            say(f"logits: {path} is damaged (sha256 differs); it is computed again")
            mine.append(n)
        else:
            sums.add(*jobs[n], np.load(io.BytesIO(data), allow_pickle=False))
    return [jobs[n] for n in sorted(n for part in ctx.world.gather(mine) for n in part)]


def _check_space(ctx: Context, work: Path, needed: int) -> None:
    """Print how many bytes will be written, and refuse if the disk lacks space (rank 0 checks, and all ranks learn the result)."""
    if ctx.world.is_main:
        free = shutil.disk_usage(work).free
        say(f"logits: {needed / 1e6:.1f} MB to write, {free / 1e6:.0f} MB free in {work.parent}")
        if needed > free:
            raise UserError(
                f"the logits need {needed / 1e6:.0f} MB but {work.parent} has {free / 1e6:.0f} MB; "
                "free some space, point --store elsewhere, or lower --logits.views or --teachers.snapshots"
            )


def _expect(ctx: Context, shards: list[int]) -> None:
    """Announce to the loader that these shards will be read completely, one after another."""
    images, size = ctx.images("train"), ctx.config.logits.batch
    starts = np.cumsum([0, *images.shards.shard_samples])
    reads = [s for s in shards for _ in range(-(-images.shards.shard_samples[s] // size))]
    images.expect(lambda read: starts[reads[read]][None], 0, len(reads))


@torch.no_grad()
def answer(ctx: Context, net: Classifier, shard: int, tick: Callable[[int], None]) -> np.ndarray:
    """Return one teacher's logits of one shard: float16 [V, n, C], rows in index order; ``tick(n)`` reports n images done."""
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


def _list(ctx: Context, work: Path, jobs: list[tuple[Teacher, int]], whole: Whole) -> None:
    """Write the list of files with their sha256."""
    names, written = [str(logit_file(work, t.index, s).relative_to(work)) for t, s in jobs], whole.as_written()
    files = [{"file": name, "sha256": written[name][1]} for name in names]
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
