"""Step: the pool of teachers. Trainings (architectures × seeds) go to whoever is free; each leaves snapshots along its way."""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gdd_dist import pretrained
from gdd_dist.artifacts import read_json, write_json
from gdd_dist.context import Context, train_order
from gdd_dist.data.augment import AUGMENT_DRAWS
from gdd_dist.data.loader import prefetch, to_float
from gdd_dist.data.order import uniform
from gdd_dist.engines import DDPEngine
from gdd_dist.finite import Skips, going_back_once
from gdd_dist.fit import sgd, warmup_cosine
from gdd_dist.models.classifiers import Classifier, has_batch_norm
from gdd_dist.monitor import Monitor, due, say
from gdd_dist.networks import TEACHERS
from gdd_dist.settings import Config
from gdd_dist.trainings import Training, finish, finished, keep, pool, record_path, tell, verify
from sharding.errors import UserError

VERSION = 1
CUTS = ("ranks_per_teacher", "accumulate", "activation_checkpointing")
"""Settings that say how a batch is cut, and how often it passes: with a batch norm they change numbers."""
FINISHED = ("training-*.json", "teacher-*.safetensors")


def settings(config: Config) -> dict[str, Any]:
    """What shapes the pool's numbers."""
    if config.teachers.pretrained:
        return {"pretrained": pretrained.hashes(config.teachers.pretrained)}
    shaping = {**config.shaping("teachers"), "loader": config.shaping("loader")}
    if any(has_batch_norm(name) for name in config.teachers.architectures):
        shaping |= {name: getattr(config.teachers, name) for name in CUTS}
    return shaping


def run(ctx: Context, work: Path) -> dict[str, Any]:
    """Train the pool into ``work``: teacher-NNN.safetensors and teachers.json. Returns what the step's record says."""
    if ctx.config.teachers.pretrained:
        return take(ctx, work, ctx.config.teachers.pretrained)
    images = ctx.images("train")
    per_epoch = train_order(ctx.config, "teachers", images.shards.shard_samples, "teacher").steps_per_epoch
    trainings = pool(ctx.config, per_epoch)
    team = ctx.team
    monitor = ctx.monitor("teachers", work, sum(t.steps for t in trainings) // team.count or 1)
    done = 0
    # Costly ones first, so that no team starts a long training when the others are done.
    costs = {
        a: sum(p.numel() for p in ctx.classifier(a, 0, "cost").parameters()) for a in ctx.config.teachers.architectures
    }
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
        mine.append(keep(ctx, net, training, 1, work))
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


def _log(monitor: Monitor, training: Training, curve: list[list[float]]) -> None:
    """Points (step, loss, learning rate) of one training; all trainings have the same learning rates."""
    for step, loss, lr in curve:
        values = {f"loss/{training.architecture}/{training.seed}": loss}
        monitor.scalars(int(step), values | ({"lr": lr} if training.index == 0 else {}))


def train_one(ctx: Context, training: Training, work: Path, monitor: Monitor, done: int) -> None:
    """Train one classifier on this team, going on from its checkpoint; ``done``: steps of this team's trainings before it."""

    def attempt(draw: int) -> None:
        train(ctx, Pupil(ctx, training, work, draw), monitor, done)

    going_back_once(f"teachers: {training.name}", attempt, "lower --teachers.lr", ctx.team.say)


class Pupil:
    """A training under way: network, engine, and what was kept of it, as of after ``start`` steps. Its files are the leader's."""

    def __init__(self, ctx: Context, training: Training, work: Path, draw: int) -> None:
        t = ctx.config.teachers
        self._ctx, self.training, self._work = ctx, training, work
        self.net = ctx.classifier(training.architecture, ctx.config.step_seed("teachers"), training.purpose)
        self._optimizer = sgd(self.net, t.lr, t.momentum, t.weight_decay, nesterov=True)
        self.engine = team_engine(ctx, self.net, self._optimizer)
        self.checkpoints = ctx.checkpoints(record_path(work, training).with_suffix(""))
        self.start, self.skips = 0, Skips()
        self._records: list[dict[str, Any]] = []
        self.curve: list[list[float]] = []
        if (found := self._load()) is not None:
            self.start, state = found
            self.net.load_state_dict(state["net"])
            self._optimizer.load_state_dict(state["optimizer"])
            self._records, self.curve = state["records"], state["curve"]
            self.skips.load_state_dict(state["skips"])
            ctx.resumed = True
        self.skips.draw = max(self.skips.draw, draw)

    def _load(self) -> tuple[int, dict[str, Any]] | None:
        """The checkpoint to go on from, if the snapshots kept before it are whole too; on every rank the leader's."""
        found, team = None, self._ctx.team
        if team.is_main:
            found = self.checkpoints.load()
            try:
                verify(self._work, found[1]["records"] if found else [])
            except UserError as e:
                tell(str(e))
                found = None
        if team.size == 1:
            return found
        buffer = io.BytesIO()
        torch.save(found, buffer)
        sent: tuple[int, dict[str, Any]] | None
        sent = torch.load(io.BytesIO(team.send(buffer.getvalue())), map_location="cpu", weights_only=True)
        return sent

    def save(self, step: int) -> None:
        """A checkpoint as of after ``step`` steps."""
        if self._ctx.team.is_main:
            state = {"net": self.net.state_dict(), "optimizer": self._optimizer.state_dict()}
            kept = {"skips": self.skips.state_dict(), "records": self._records, "curve": self.curve}
            self.checkpoints.save(step, {**state, **kept})

    def keep(self, step: int) -> None:
        """Keep the teacher of after ``step`` steps."""
        if self._ctx.team.is_main:
            self._records.append(keep(self._ctx, self.net, self.training, step, self._work))

    def finish(self) -> None:
        """All steps are done."""
        self.engine.close()
        if self._ctx.team.is_main:
            finish(self._work, self.training, self._records, self.curve)


def team_engine(ctx: Context, net: Classifier, optimizer: torch.optim.Optimizer) -> DDPEngine:
    """What carries a classifier through its training on this rank's team."""
    t, size = ctx.config.teachers, ctx.manifest.height
    net.recompute = t.activation_checkpointing
    example = torch.zeros(1, ctx.manifest.channels, size, size, device=ctx.device)
    return DDPEngine(net, optimizer, ctx.team, ctx.precision, (example,), t.accumulate, loss_scale=False)


def train(ctx: Context, pupil: Pupil, monitor: Monitor, done: int) -> None:
    """One attempt at the steps that are left; ends with the training's record."""
    training, skips, team = pupil.training, pupil.skips, ctx.team
    images, steps, seed = ctx.images("train"), training.steps, ctx.config.step_seed("teachers")
    order = train_order(ctx.config, "teachers", images.shards.shard_samples, training.purpose)
    _log(monitor, training, pupil.curve)
    if pupil.start:
        monitor.already(min(done + pupil.start, monitor.total))

    mine = partial(order.batch, rank=team.rank, world=team.size)
    images.expect(mine, pupil.start, steps)

    def read(step: int) -> tuple[Tensor, ...]:
        indices = mine(step)
        slots = np.arange(len(indices)) + team.rank * len(indices)
        draws = uniform(skips.seed(seed), f"{training.purpose}/augment", step, slots, AUGMENT_DRAWS)
        return images.read(indices), torch.from_numpy(images.labels[indices]), torch.from_numpy(draws)

    for step, (batch, labels, draws) in enumerate(
        prefetch(read, pupil.start, steps, ctx.config.loader.prefetch), pupil.start
    ):
        vote = team.vote(pupil.checkpoints.due() and step + 1 < steps)
        lr = warmup_cosine(step, steps, ctx.config.teachers.lr)
        x = ctx.augment(to_float(batch, ctx.device), draws)
        loss = train_step(pupil.engine, x, labels.to(ctx.device), lr, skips)
        team.say(skips.line(f"teachers: {training.name}", step + 1))
        if due(step, steps):
            pupil.curve.append([step, team.mean(loss), lr])
            _log(monitor, training, pupil.curve[-1:])
        if step + 1 in training.snapshots:
            pupil.keep(step + 1)
        monitor.advance(min(done + step + 1, monitor.total), training.name)
        vote.obey(partial(pupil.save, step + 1), sound=not skips.in_a_row)
    pupil.finish()


def train_step(engine: DDPEngine, images: Tensor, labels: Tensor, lr: float, skips: Skips) -> Tensor:
    """One step of cross-entropy on this rank's share: float images [b, C, H, W] in [-1, 1], labels int64 [b]. Returns its loss.

    A step whose loss or gradient is not finite, on any rank, moves nothing, and counts in ``skips``. Raises Diverged after too
    many in a row.
    """
    running = [b.clone() for b in engine.module.buffers()]
    losses = []
    for x, y in zip(images.chunk(engine.accumulate), labels.chunk(engine.accumulate), strict=True):
        loss = F.cross_entropy(engine(x), y)
        engine.backward(loss)
        losses.append(loss.detach())
    moved = engine.step(lr)
    if not moved:  # nor may a batch norm remember it
        torch._foreach_copy_(list(engine.module.buffers()), running)
    skips.note(moved)
    return torch.stack(losses).mean()
