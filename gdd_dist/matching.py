"""Step: move the generator until the teachers answer its images as they answer real ones of the same class."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gdd_dist import losses
from gdd_dist.adversarial import Adversaries, augmentation, ema_decay, mirrored
from gdd_dist.context import Context
from gdd_dist.data.augment import AUGMENT_DRAWS
from gdd_dist.data.loader import prefetch, to_float
from gdd_dist.data.order import dealt, normal, uniform
from gdd_dist.engines import autocast, image_gradient
from gdd_dist.fit import cosine
from gdd_dist.logit_cache import LogitCache
from gdd_dist.monitor import Monitor, due, say
from gdd_dist.networks import (
    DISCRIMINATOR,
    GENERATOR,
    cpu_state,
    load_discriminator_network,
    load_generator_network,
    read_teachers,
    save_network,
)
from gdd_dist.pictures import sample_grid
from gdd_dist.quick import Measured, measure
from gdd_dist.settings import Config

VERSION = 1
OnInterval = Callable[[int, torch.nn.Module, Measured], bool]


def settings(config: Config) -> dict[str, Any]:
    """What shapes matching's numbers; quick students train as the report's do."""
    report = config.shaping("report")
    gan = config.shaping("gan")
    return {
        **config.shaping("matching"),
        "loader": config.shaping("loader"),
        "student": {k: report[k] for k in ("lr", "momentum", "weight_decay")},
        "gan": {k: gan[k] for k in ("augment", "augment_p", "beta1", "beta2")},
    }


@dataclass(frozen=True)
class Groups:
    """One rank's part of a global batch. G groups of n slots, B = G·n slots in group order.

    ``classes``, ``teachers``: int64 [G], the teachers as numbers in the cache; ``samples``, ``views``: int64 [B], the real side of each pair.
    """

    classes: np.ndarray
    teachers: np.ndarray
    samples: np.ndarray
    views: np.ndarray
    slots: np.ndarray

    @property
    def size(self) -> int:
        """n."""
        return len(self.slots) // len(self.classes)

    @property
    def labels(self) -> np.ndarray:
        """Class of each slot, int64 [B]."""
        return np.repeat(self.classes, self.size)

    def by_teacher(self) -> Iterator[tuple[int, np.ndarray]]:
        """Each teacher of the batch with the places of its slots, int64."""
        by_slot = np.repeat(self.teachers, self.size)
        for teacher in np.unique(self.teachers):
            yield int(teacher), np.flatnonzero(by_slot == teacher)


class Dealer:
    """Which class, teacher, real sample and view stand in which slot: a function of (seed, step, slot)."""

    def __init__(self, config: Config, labels: np.ndarray, teachers: np.ndarray, views: int) -> None:
        m = config.matching
        self._seed, self._n, self._groups, self._teachers, self._views = (
            config.step_seed("matching"),
            m.group,
            m.batch // m.group,
            teachers,
            views,
        )
        self._present = np.unique(labels)
        self._members = {int(c): np.flatnonzero(labels == c) for c in self._present}

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Groups:
        """This rank's groups of global batch ``step``: classes and teachers come evenly, each class's samples once before any twice."""
        seed, n, share = self._seed, self._n, self._groups // world
        groups = np.arange(rank * share, (rank + 1) * share)
        places = step * self._groups + groups
        count = len(self._present)
        classes = self._present[dealt(seed, "matching/class", places, count)]
        teachers = self._teachers[dealt(seed, "matching/teacher", places, len(self._teachers))]
        samples = []
        for place, c in zip(places.tolist(), classes.tolist(), strict=True):
            members = self._members[c]
            turn = place // count  # how many groups of this class came before
            samples.append(
                members[dealt(seed, f"matching/sample/{c}", np.arange(turn * n, (turn + 1) * n), len(members))]
            )
        slots = np.arange(rank * share * n, (rank + 1) * share * n)
        views = (uniform(seed, "matching/view", step, slots, 1)[:, 0] * self._views).astype(np.int64)
        return Groups(classes, teachers, np.concatenate(samples), views, slots)


class Matcher:
    """The loss of a batch of generated images, from frozen teachers and the cache."""

    def __init__(self, ctx: Context, teachers_dir: Path, logits_dir: Path) -> None:
        m, pool = ctx.config.matching, read_teachers(teachers_dir)
        chosen = [t for t in pool if m.teachers == "all" or t.last]
        self._ctx, self._nets = ctx, {t.index: ctx.teacher(t) for t in chosen}
        images = ctx.images("train")
        self.cache = LogitCache(logits_dir, images.shards.shard_samples)
        views = min(m.views or self.cache.views, self.cache.views)
        self._means = torch.from_numpy(self.cache.class_means[:, :views].mean(1)).to(ctx.device)
        self.dealer = Dealer(ctx.config, images.labels, np.array([t.index for t in chosen]), views)

    def real_logits(self, groups: Groups) -> Tensor:
        """The cache's side of each pair, float32 [B, C]."""
        out = np.empty((len(groups.slots), self._ctx.classes), dtype=np.float32)
        for teacher, here in groups.by_teacher():
            out[here] = self.cache.take(teacher, groups.samples[here], groups.views[here])
        return torch.from_numpy(out)

    def loss(self, images: Tensor, groups: Groups, real_logits: Tensor, draws: Tensor) -> dict[str, Tensor]:
        """``pair`` and ``mean`` of float images [B, C, H, W], differentiable.

        A slot whose real view is plain stays plain itself.
        """
        ctx, m = self._ctx, self._ctx.config.matching
        plain = torch.from_numpy(groups.views == 0).to(images.device)[:, None, None, None]
        seen = torch.where(plain, images, ctx.augment(images, draws))
        logits = images.new_zeros(len(images), ctx.classes)
        for teacher, places in groups.by_teacher():
            here = torch.from_numpy(places).to(images.device)
            with autocast(ctx.device, ctx.precision):
                answer = self._nets[teacher](seen[here])
            logits = logits.index_copy(0, here, answer.float())
        pair = (
            losses.dim(real_logits, logits)
            if m.loss == "dim"
            else getattr(losses, m.loss)(real_logits, logits, m.temperature)
        )
        means = self._means[torch.from_numpy(groups.teachers), torch.from_numpy(groups.classes)]
        by_group = logits.view(len(groups.classes), groups.size, -1)
        return {"pair": pair, "mean": losses.mean_logit(means, by_group)}


class Run:
    """The state of the step: networks, measurements so far, the best generator among them."""

    def __init__(self, ctx: Context, work: Path, gan_dir: Path) -> None:
        gan = ctx.config.gan
        generator, self.meta = load_generator_network(gan_dir / GENERATOR)
        self.nets = Adversaries(
            ctx, generator, load_discriminator_network(gan_dir / DISCRIMINATOR), (gan.beta1, gan.beta2)
        )
        self.nets.load_discriminator_state(gan_dir)
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Tensor] = {}
        self.checkpoints = ctx.checkpoints(work / "checkpoints")
        self.start = 0
        if (found := self.checkpoints.load()) is not None:
            self.start, state = found
            self.nets.load_state_dict(state["nets"])
            self.history, self.best = state["history"], state["best"]
            ctx.resumed = True

    def save(self, step: int) -> None:
        """A checkpoint as of after ``step`` steps."""
        self.checkpoints.save(step, {"nets": self.nets.state_dict(), "history": self.history, "best": self.best})

    def measure(self, ctx: Context, step: int, monitor: Monitor) -> Measured:
        """Quick students on val, once per interval; keeps the generator where it is the best so far."""
        if self.history and self.history[-1]["step"] == step:
            return Measured(**self.history[-1])
        result = measure(ctx, self.nets.ema, step)
        if not self.history or ctx.config.matching.select == "last" or result.val > max(h["val"] for h in self.history):
            self.best = cpu_state(self.nets.ema)
        self.history.append(result.as_dict())
        monitor.scalars(step, {"val_accuracy": result.val, "val_stderr": result.stderr, "shortcut_gap": result.gap})
        if ctx.world.is_main:
            monitor.picture("samples", sample_grid(ctx, self.nets.ema), step)
            say(
                f"matching: step {step}, quick students {result.val:.1f} ± {result.stderr:.1f} % on val, shortcut gap {result.gap:.1f}"
            )
        return result


def run(
    ctx: Context,
    work: Path,
    teachers_dir: Path,
    logits_dir: Path,
    gan_dir: Path,
    provenance: dict[str, Any],
    on_interval: OnInterval | None = None,
) -> dict[str, Any]:
    """Match into ``work``: generator.safetensors. ``on_interval(step, ema generator, measured)`` → whether to stop, asked on rank 0."""
    m, world = ctx.config.matching, ctx.world
    matcher, state = Matcher(ctx, teachers_dir, logits_dir), Run(ctx, work, gan_dir)
    images = ctx.images("train")
    monitor = ctx.monitor("matching", work, m.steps, start=state.start)

    def pause(step: int) -> bool:
        measured = state.measure(ctx, step, monitor)
        return bool(
            world.broadcast(on_interval is not None and world.is_main and on_interval(step, state.nets.ema, measured))
        )

    def read(step: int) -> tuple[Any, ...]:
        groups = matcher.dealer.batch(step, world.rank, world.size)
        real = images.read(groups.samples) if m.lambda_adv else torch.empty(0)
        return groups, matcher.real_logits(groups), real

    for step, (groups, real_logits, real) in enumerate(
        prefetch(read, state.start, m.steps, ctx.config.loader.prefetch), state.start
    ):
        if step % m.interval == 0 and pause(step):
            break
        scalars = train_step(ctx, state.nets, matcher, step, groups, real_logits, real)
        if due(step, m.steps):
            monitor.scalars(step, {**world.mean(scalars), "lr": cosine(step, m.steps, m.lr, m.lr / 10)})
        monitor.advance(step + 1, images=m.batch)
        if state.checkpoints.due() and step + 1 < m.steps and world.is_main:
            monitor.flush()
            state.save(step + 1)
    else:
        pause(m.steps)
    monitor.close()
    if world.is_main:
        save_best(ctx, work, state, provenance)
    state.nets.close()
    return {"history": state.history, "selected": m.select}


def save_best(ctx: Context, work: Path, state: Run, provenance: dict[str, Any]) -> None:
    """The selected generator as one self-contained file."""
    state.nets.ema.load_state_dict(state.best)
    save_network(work / GENERATOR, state.nets.ema, {**state.meta, "provenance": provenance, "history": state.history})


def train_step(
    ctx: Context,
    nets: Adversaries,
    matcher: Matcher,
    step: int,
    groups: Groups,
    real_logits: Tensor,
    real_uint8: Tensor,
) -> dict[str, Tensor]:
    """One step on this rank's groups; returns scalars: loss, pair, mean, adv and the discriminator's."""
    m, seed, slots = ctx.config.matching, ctx.config.step_seed("matching"), groups.slots
    labels = torch.from_numpy(groups.labels).to(ctx.device)
    z = torch.from_numpy(normal(seed, "matching/z", step, slots, nets.generator.latent)).to(ctx.device)
    draws = torch.from_numpy(uniform(seed, "matching/augment", step, slots, AUGMENT_DRAWS))
    real_logits = real_logits.to(ctx.device)
    scalars: dict[str, Tensor] = {}
    fake = nets.g(z, labels)
    real = mirrored(ctx, to_float(real_uint8, ctx.device), step, slots, seed, "matching/flip") if m.lambda_adv else None
    if real is not None:
        through = augmentation(ctx, seed, "matching/augment/d", step, slots)
        scalars |= nets.train_discriminator(real, fake, labels, m.gamma, through, m.lr_d)

    def total(images: Tensor) -> Tensor:
        parts = matcher.loss(images, groups, real_logits, draws)
        loss = m.lambda_pair * parts["pair"] + m.lambda_mean * parts["mean"]
        if real is not None:
            through = augmentation(ctx, seed, "matching/augment/g", step, slots)
            parts["adv"] = nets.generator_loss(real, images, labels, through)
            loss = loss + m.lambda_adv * parts["adv"]
        scalars.update({k: v.detach() for k, v in parts.items()})
        return loss

    loss, gradient = image_gradient(total, fake)
    nets.g.backward((fake * gradient).sum())
    nets.g.step(cosine(step, m.steps, m.lr, m.lr / 10))
    nets.update_ema(ema_decay(m.batch, m.ema_images))
    return {"loss": loss, **scalars}
