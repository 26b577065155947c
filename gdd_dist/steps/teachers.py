"""Step: the pool of teachers. The next free team takes a training (architecture × seed), which yields several snapshots."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from gdd_dist.config.steps import Inputs
from gdd_dist.data.augment import AUGMENT_DRAWS
from gdd_dist.data.images import to_float
from gdd_dist.data.noise import uniform
from gdd_dist.engines.ddp import DDPEngine
from gdd_dist.models import pretrained, pretrained_networks
from gdd_dist.models.classifiers import Classifier, classifier_weights
from gdd_dist.models.files import TEACHERS
from gdd_dist.runtime.monitor import Monitor, say
from gdd_dist.steps.teacher_pool import (
    LeaderCheckpoints,
    Training,
    finish,
    finished,
    keep,
    pool,
    record_path,
)
from gdd_dist.storage.json_files import read_json, write_json
from gdd_dist.training import loop
from gdd_dist.training.classifier_fit import sgd
from gdd_dist.training.context import Context, train_order
from gdd_dist.training.schedules import warmup_cosine
from gdd_dist.training.skipped_steps import Skips

FINISHED = ("training-*.json", "teacher-*.safetensors")


def run(ctx: Context, work: Path, inputs: Inputs) -> dict[str, Any]:
    """Train the pool, and write teacher-NNN.safetensors and teachers.json into ``work``. Returns the step's record."""
    if ctx.config.teachers.pretrained:
        return take(ctx, work, ctx.config.teachers.pretrained)
    images = ctx.images("train")
    per_epoch = train_order(ctx.config, "teachers", images.shards.shard_samples, "teacher").steps_per_epoch
    trainings = pool(ctx.config, per_epoch)
    team = ctx.team
    monitor = ctx.monitor("teachers", work, sum(t.steps for t in trainings) // team.count or 1)
    done = 0
    # Expensive ones first, so that no team starts a long training when the others are finished.
    names = set(ctx.config.teachers.architectures)
    if len(names) > 1:
        shape = {"channels": ctx.manifest.channels, "size": ctx.manifest.height, "classes": ctx.classes}
        costs = {name: classifier_weights(name, **shape) for name in names}
        trainings.sort(key=lambda t: -costs[t.architecture])
    logged = set()
    ctx.disks.share(work, FINISHED)
    for job in team.queue(len(trainings)):
        if team.broadcast(team.is_main and finished(work, trainings[job]) is not None):
            ctx.resumed = True
            monitor.already(min(done + trainings[job].steps, monitor.total))
        else:
            logged.add(trainings[job].index)
            train_one(ctx, trainings[job], work, monitor, done)
        done += trainings[job].steps
    ctx.world.barrier()
    ctx.disks.share(work, FINISHED)
    trained = {
        t: read_json(record_path(work, t)) for t in sorted(trainings, key=lambda t: t.index)
    }  # verified in this run
    for training, result in trained.items():
        if training.index not in logged:  # trained by another rank or by an interrupted run
            log_curve(monitor, training, result["curve"])
    return _list(ctx, work, monitor, [r for result in trained.values() for r in result["teachers"]])


def take(ctx: Context, work: Path, directory: str) -> dict[str, Any]:
    """Take pretrained teachers: measure them on val, and write them like our own, with mean and std."""
    files = pretrained.files(directory)
    monitor = ctx.monitor("teachers", work, len(files), unit="teacher")
    mine = []
    for i in ctx.world.queue(len(files)):
        net = ctx.watch(pretrained_networks.load(files[i], ctx.manifest)).eval()
        training = Training(i, files[i].architecture, i, 1, (1,))
        mine.append(keep(ctx, net, training, 1, work))
        say(f"teachers: {files[i].path.name}, {files[i].architecture}: {mine[-1]['val_accuracy']:.1f} % on val")
        monitor.advance(min((len(mine)) * ctx.world.size, len(files)))
    return _list(
        ctx, work, monitor, sorted((r for part in ctx.world.gather(mine) for r in part), key=lambda r: r["file"])
    )


def _list(ctx: Context, work: Path, monitor: Monitor, records: list[dict[str, Any]]) -> dict[str, Any]:
    """Write teachers.json and log each teacher's accuracy; returns the step's record."""
    if ctx.world.is_main:
        write_json(work / TEACHERS, {"format": "gdd-teachers/1", "teachers": records})
    for i, record in enumerate(records):
        monitor.scalars(i, {"val_accuracy": record["val_accuracy"]})
    monitor.close()
    return {"val_accuracy": max(r["val_accuracy"] for r in records)}


def log_curve(monitor: Monitor, training: Training, curve: list[list[float]]) -> None:
    """Log the points (step, loss, learning rate) of one training; all trainings have the same learning rates."""
    for step, loss, lr in curve:
        values = {f"loss/{training.architecture}/{training.seed}": loss}
        monitor.scalars(int(step), values | ({"lr": lr} if training.index == 0 else {}))


def train_one(ctx: Context, training: Training, work: Path, monitor: Monitor, done: int) -> None:
    """Train one classifier on this team, from its checkpoint if it has one; ``done``: steps of this team's earlier trainings."""
    checkpoints = LeaderCheckpoints(ctx, training, work)
    name = f"teachers: {training.name}"
    loop.train(
        ctx, lambda: Pupil(ctx, training, work, monitor, done), ctx.team, checkpoints, name, "lower --teachers.lr"
    ).finish()


class Pupil(loop.Trainee):
    """One classifier that this team trains, and its snapshots. The leader writes its files."""

    def __init__(self, ctx: Context, training: Training, work: Path, monitor: Monitor, done: int) -> None:
        t, team = ctx.config.teachers, ctx.team
        self.name, self.steps, self.monitor = f"teachers: {training.name}", training.steps, monitor
        self._ctx, self.training, self._work, self._done = ctx, training, work, done
        self._images, self.skips = ctx.images("train"), Skips()
        self.net = ctx.classifier(training.architecture, ctx.config.step_seed("teachers"), training.purpose)
        self._optimizer = sgd(self.net, t.lr, t.momentum, t.weight_decay, nesterov=True)
        self.engine = team_engine(ctx, self.net, self._optimizer)
        order = train_order(ctx.config, "teachers", self._images.shards.shard_samples, training.purpose)
        self._samples = partial(order.batch, rank=team.rank, world=team.size)
        self._records: list[dict[str, Any]] = []
        self.curve: list[list[float]] = []

    def begin(self, start: int) -> None:
        """Log the steps before an interruption, and announce to the loader which images will be read."""
        log_curve(self.monitor, self.training, self.curve)
        if start:
            self.monitor.already(min(self._done + start, self.monitor.total))
        self._images.expect(self._samples, start, self.steps)

    def read(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Read this rank's share: images uint8 [b, C, H, W], labels int64 [b], augmentation draws [b, AUGMENT_DRAWS]."""
        indices, seed = self._samples(step), self._ctx.config.step_seed("teachers")
        slots = np.arange(len(indices)) + self._ctx.team.rank * len(indices)
        draws = uniform(self.skips.seed(seed), f"{self.training.purpose}/augment", step, slots, AUGMENT_DRAWS)
        labels = torch.from_numpy(self._images.labels[indices])
        return self._ctx.sent((self._images.read(indices), labels, torch.from_numpy(draws)))

    def train(self, step: int, batch: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
        """Make one step of cross-entropy on augmented images."""
        images, labels, draws = batch
        x = self._ctx.augment(to_float(images, self._ctx.device), draws)
        return {"loss": teacher_step(self.engine, x, labels, self._lr(step), self.skips)}

    def _lr(self, step: int) -> float:
        return warmup_cosine(step, self.steps, self._ctx.config.teachers.lr)

    def log(self, step: int, scalars: dict[str, float]) -> None:
        """Add a point to the curve."""
        self.curve.append([step, scalars["loss"], self._lr(step)])
        log_curve(self.monitor, self.training, self.curve[-1:])

    def after_step(self, done: int) -> None:
        """Keep a snapshot if one is due, and show progress."""
        if done in self.training.snapshots and self._ctx.team.is_main:
            self._records.append(keep(self._ctx, self.net, self.training, done, self._work))
        self.monitor.advance(min(self._done + done, self.monitor.total), self.training.name)

    def state_dict(self) -> dict[str, Any]:
        """Return network, optimizer, skipped steps, and the snapshots so far."""
        state = {"net": self.net.state_dict(), "optimizer": self._optimizer.state_dict()}
        return {**state, "skips": self.skips.state_dict(), "records": self._records, "curve": self.curve}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the result of ``state_dict``."""
        self.net.load_state_dict(state["net"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._records, self.curve = state["records"], state["curve"]
        self.skips.load_state_dict(state["skips"])

    def close(self) -> None:
        """Free the engine."""
        self.engine.close()

    def finish(self) -> None:
        """Let the leader write the record of the finished training."""
        self.close()
        if self._ctx.team.is_main:
            finish(self._work, self.training, self._records, self.curve)


def team_engine(ctx: Context, net: Classifier, optimizer: torch.optim.Optimizer) -> DDPEngine:
    """Return the engine that trains a classifier on this rank's team."""
    t, size = ctx.config.teachers, ctx.manifest.height
    net.recompute = t.activation_checkpointing
    example = torch.zeros(1, ctx.manifest.channels, size, size, device=ctx.device)
    return DDPEngine(net, optimizer, ctx.team, ctx.precision, (example,), t.accumulate, loss_scale=False)


def teacher_step(engine: DDPEngine, images: Tensor, labels: Tensor, lr: float, skips: Skips) -> Tensor:
    """Make one step of cross-entropy on this rank's share: float images [b, C, H, W] in [-1, 1], labels int64 [b]. Returns its loss.

    A step whose loss or gradient is not finite, on any rank, moves nothing, and counts in ``skips``. Raises Diverged after too
    many in a row.
    """
    running = [b for m in engine.module.modules() if isinstance(m, _BatchNorm) for b in m.buffers()]
    before = [b.clone() for b in running]
    losses = []
    for x, y in zip(images.chunk(engine.accumulate), labels.chunk(engine.accumulate), strict=True):
        loss = F.cross_entropy(engine(x), y)
        engine.backward(loss)
        losses.append(loss.detach())
    moved = engine.step(lr)
    for now, then in zip(running, before, strict=True):  # a skipped step must not change batch statistics either
        now.copy_(torch.where(moved, now, then))
    skips.note(moved)
    return torch.stack(losses).mean()
