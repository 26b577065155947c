"""Step: the pool of teachers. Trainings (architectures × seeds) go to whoever is free; each leaves snapshots along its way."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gdd_dist import pretrained
from gdd_dist.artifacts import CHECKPOINTS, fingerprint, read_json, verify_file, write_json
from gdd_dist.checkpoint import Checkpoints
from gdd_dist.context import Context, train_order
from gdd_dist.data.augment import AUGMENT_DRAWS
from gdd_dist.data.loader import prefetch, to_float
from gdd_dist.data.order import uniform
from gdd_dist.finite import Skips, going_back_once
from gdd_dist.fit import accuracy, sgd, train_step, warmup_cosine
from gdd_dist.models.classifiers import Classifier
from gdd_dist.monitor import Monitor, due, say
from gdd_dist.networks import TEACHERS, save_network
from gdd_dist.settings import Config
from sharding.errors import UserError
from sharding.files import sha256_file

VERSION = 1
FINISHED = ("training-*.json", "teacher-*.safetensors")


def settings(config: Config) -> dict[str, Any]:
    """What shapes the pool's numbers."""
    if config.teachers.pretrained:
        return {"pretrained": pretrained.hashes(config.teachers.pretrained)}
    loader = config.shaping("loader")
    return {**config.shaping("teachers"), "loader": loader}


@dataclass(frozen=True)
class Training:
    """One training of the pool; ``snapshots``: step counts after which a teacher is kept, ascending, the last one last."""

    index: int
    architecture: str
    seed: int
    steps: int
    snapshots: tuple[int, ...]

    @property
    def purpose(self) -> str:
        """The name of its random streams."""
        return f"teacher/{self.architecture}/{self.seed}"


def pool(config: Config, steps_per_epoch: int) -> list[Training]:
    """All trainings. Snapshots stand at 1, 1/3, 1/9, … of a training: early ones teach coarse structure."""
    t = config.teachers
    steps = t.epochs * steps_per_epoch
    marks = sorted({max(1, round(steps * 3.0**-k)) for k in range(t.snapshots)})
    pairs = [(a, s) for s in range(t.seeds) for a in t.architectures]
    return [Training(i, a, s, steps, tuple(marks)) for i, (a, s) in enumerate(pairs)]


def run(ctx: Context, work: Path) -> dict[str, Any]:
    """Train the pool into ``work``: teacher-NNN.safetensors and teachers.json. Returns what the step's record says."""
    if ctx.config.teachers.pretrained:
        return take(ctx, work, ctx.config.teachers.pretrained)
    images = ctx.images("train")
    per_epoch = train_order(ctx.config, "teachers", images.shards.shard_samples, "teacher").steps_per_epoch
    trainings = pool(ctx.config, per_epoch)
    monitor = ctx.monitor("teachers", work, sum(t.steps for t in trainings) // ctx.world.size or 1)
    done = 0
    # Costly ones first, so that no rank starts a long training when the others are done.
    costs = {
        a: sum(p.numel() for p in ctx.classifier(a, 0, "cost").parameters()) for a in ctx.config.teachers.architectures
    }
    trainings.sort(key=lambda t: -costs[t.architecture])
    logged = set()
    ctx.disks.share(work, FINISHED)
    for job in ctx.world.queue(len(trainings)):
        if finished(work, trainings[job]) is None:
            logged.add(trainings[job].index)
            train_one(ctx, trainings[job], work, monitor, done)
        else:
            ctx.resumed = True
        done += trainings[job].steps
    ctx.world.barrier()
    ctx.disks.share(work, FINISHED)
    trained = {t: read_json(_record(work, t)) for t in sorted(trainings, key=lambda t: t.index)}  # verified in this run
    for training, result in trained.items():
        if training.index not in logged:  # another rank's, or an interrupted run's
            _log(monitor, training, result["curve"])
    return _list(ctx, work, monitor, [r for result in trained.values() for r in result["teachers"]])


def take(ctx: Context, work: Path, directory: str) -> dict[str, Any]:
    """The pool of teachers that somebody else trained: measured on val, written like our own, mean and std with them."""
    files = pretrained.files(directory)
    monitor = ctx.monitor("teachers", work, len(files), unit="teacher")
    mine = []
    for i in ctx.world.queue(len(files)):
        net = ctx.watch(pretrained.load(files[i], ctx.manifest)).eval()
        training = Training(i, files[i].architecture, i, 1, (1,))
        mine.append(_keep(ctx, net, training, 1, work))
        say(f"teachers: {files[i].path.name}, {files[i].architecture}: {mine[-1]['val_accuracy']:.1f} % on val")
        monitor.advance(min((len(mine)) * ctx.world.size, len(files)))
    return _list(
        ctx, work, monitor, sorted((r for part in ctx.world.gather(mine) for r in part), key=lambda r: r["file"])
    )


def _list(ctx: Context, work: Path, monitor: Monitor, records: list[dict[str, Any]]) -> dict[str, Any]:
    """Write teachers.json and log each teacher's accuracy; returns what the step's record says."""
    if ctx.world.is_main:
        write_json(work / TEACHERS, {"format": "gdd-teachers/1", "teachers": records})
    for i, record in enumerate(records):
        monitor.scalars(i, {"val_accuracy": record["val_accuracy"]})
    monitor.close()
    return {"val_accuracy": max(r["val_accuracy"] for r in records)}


def _record(work: Path, training: Training) -> Path:
    return work / CHECKPOINTS / f"training-{training.index:03d}.json"


def finished(work: Path, training: Training) -> dict[str, Any] | None:
    """The record of a training that is done, None of one that is not; a damaged file is named, and its training done again."""
    path = _record(work, training)
    if not path.exists():
        return None
    try:
        body: dict[str, Any] = read_json(path)
        if body.pop("check", None) != fingerprint(body):
            raise UserError(f"{path} is damaged; its training is done again")
        _verify(work, body["teachers"])
    except UserError as e:
        _tell(str(e))
        return None
    return body


@cache
def _tell(fault: str) -> None:
    """Say it once: a training that is done again meets the same damaged file where it looks for its checkpoint."""
    say(f"teachers: {fault}")


def _verify(work: Path, records: list[dict[str, Any]]) -> None:
    """Raise UserError when a snapshot that was kept is not as it was written."""
    for record in records:
        verify_file(work / record["file"], record["bytes"], record["sha256"], "its training is done again")


def _log(monitor: Monitor, training: Training, curve: list[list[float]]) -> None:
    """Points (step, loss, learning rate) of one training; all trainings have the same learning rates."""
    for step, loss, lr in curve:
        values = {f"loss/{training.architecture}/{training.seed}": loss}
        monitor.scalars(int(step), values | ({"lr": lr} if training.index == 0 else {}))


def train_one(ctx: Context, training: Training, work: Path, monitor: Monitor, done: int) -> None:
    """Train one classifier on this rank, going on from its checkpoint; ``done``: steps of this rank's trainings before it."""
    name = f"teachers: {training.architecture} seed {training.seed}"
    attempt = partial(train_from_checkpoint, ctx, training, work, monitor, done)
    going_back_once(name, attempt, "lower --teachers.lr", say)


def train_from_checkpoint(ctx: Context, training: Training, work: Path, monitor: Monitor, done: int, draw: int) -> None:
    """One attempt; ``draw``: of the augmentation. Writes the training's record when it is done."""
    seed, t = ctx.config.step_seed("teachers"), ctx.config.teachers
    images = ctx.images("train")
    order = train_order(ctx.config, "teachers", images.shards.shard_samples, training.purpose)
    net = ctx.classifier(training.architecture, seed, training.purpose)
    optimizer = sgd(net, t.lr, t.momentum, t.weight_decay, nesterov=True)
    checkpoints = ctx.checkpoints(work / CHECKPOINTS / f"training-{training.index:03d}")
    start, records, curve, skips = 0, [], [], Skips()
    if (found := _load(checkpoints, work)) is not None:
        start, state = found
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        records, curve = state["records"], state["curve"]
        skips.load_state_dict(state["skips"])
        ctx.resumed = True
    skips.draw = max(skips.draw, draw)
    _log(monitor, training, curve)

    def read(step: int) -> tuple[torch.Tensor, ...]:
        indices = order.batch(step)
        draws = uniform(skips.seed(seed), f"{training.purpose}/augment", step, np.arange(len(indices)), AUGMENT_DRAWS)
        return images.read(indices), torch.from_numpy(images.labels[indices]), torch.from_numpy(draws)

    for step, (batch, labels, draws) in enumerate(
        prefetch(read, start, training.steps, ctx.config.loader.prefetch), start
    ):
        lr = warmup_cosine(step, training.steps, t.lr)
        x = ctx.augment(to_float(batch, ctx.device), draws)
        loss = train_step(net, optimizer, x, labels.to(ctx.device), lr, ctx.precision, skips)
        if line := skips.line(f"teachers: {training.architecture} seed {training.seed}", step + 1):
            say(line)
        if due(step, training.steps):
            curve.append([step, float(loss), lr])
            _log(monitor, training, curve[-1:])
        if step + 1 in training.snapshots:
            records.append(_keep(ctx, net, training, step + 1, work))
        monitor.advance(min(done + step + 1, monitor.total), f"{training.architecture} seed {training.seed}")
        stop = ctx.world.stopping
        if (stop or (checkpoints.due() and not skips.in_a_row)) and step + 1 < training.steps:
            state = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "skips": skips.state_dict()}
            checkpoints.save(step + 1, {**state, "records": records, "curve": curve})
            if stop:
                ctx.world.check_stop()
    _record(work, training).parent.mkdir(exist_ok=True)
    body = {"teachers": records, "curve": curve}
    write_json(_record(work, training), {**body, "check": fingerprint(body)})


def _load(checkpoints: Checkpoints, work: Path) -> tuple[int, dict[str, Any]] | None:
    """The checkpoint to go on from, if the snapshots kept before it are whole too."""
    found = checkpoints.load()
    try:
        _verify(work, found[1]["records"] if found else [])
    except UserError as e:
        _tell(str(e))
        return None
    return found


def _keep(ctx: Context, net: Classifier, training: Training, step: int, work: Path) -> dict[str, Any]:
    """Measure a snapshot on val and write it."""
    snapshot = training.snapshots.index(step)
    name = f"teacher-{training.index * len(training.snapshots) + snapshot:03d}.safetensors"
    score = accuracy(net, ctx.images("val"), ctx.device, ctx.precision)
    save_network(
        work / name,
        net,
        {"format": "gdd-classifier/1", "architecture": training.architecture, "data": ctx.manifest.fingerprint},
    )
    return {
        "file": name,
        "bytes": (work / name).stat().st_size,
        "sha256": sha256_file(work / name),
        "architecture": training.architecture,
        "seed": training.seed,
        "step": step,
        "snapshot": snapshot,
        "last": step == training.steps,
        "val_accuracy": score,
    }
