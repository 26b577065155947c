"""Step: move the generator until the teachers answer its images as they answer real ones of the same class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gdd_dist import losses
from gdd_dist.adversarial import Adversaries, augmentation, ema_decay, mean_scalars, mirrored
from gdd_dist.artifacts import CHECKPOINTS
from gdd_dist.context import Context
from gdd_dist.data.augment import AUGMENT_DRAWS
from gdd_dist.data.loader import prefetch, to_float
from gdd_dist.data.order import normal, uniform
from gdd_dist.dealer import Dealer, Groups
from gdd_dist.engines import autocast, cpu_state, image_gradient
from gdd_dist.finite import going_back_once
from gdd_dist.fit import cosine
from gdd_dist.logit_cache import LogitCache
from gdd_dist.monitor import Monitor, due, say
from gdd_dist.networks import (
    DISCRIMINATOR,
    GENERATOR,
    load_discriminator_network,
    load_generator_network,
    read_teachers,
    save_network,
)
from gdd_dist.pictures import sample_grid
from gdd_dist.quick import Measured, measure
from gdd_dist.settings import Config
from gdd_dist.signals import Preempted

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
        self.answers: tuple[Tensor, Tensor] | None = None
        """Teacher logits of the last batch, real and generated, float32 [B, C]."""

    def log(self, monitor: Monitor, step: int) -> None:
        """Histograms of both sides' standardized answers: matching lays one on the other."""
        if self.answers is not None and self._ctx.world.is_main:
            for name, logits in zip(("real", "generated"), self.answers, strict=True):
                monitor.histogram(f"teacher_answers/{name}", losses.standardize(logits).cpu().numpy(), step)

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
        self.answers = real_logits, logits.detach()
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

    def __init__(self, ctx: Context, work: Path, gan_dir: Path, draw: int = 0) -> None:
        gan, self.main = ctx.config.gan, ctx.world.is_main
        generator, self.meta = load_generator_network(gan_dir / GENERATOR)
        self.nets = Adversaries(
            ctx, generator, load_discriminator_network(gan_dir / DISCRIMINATOR), (gan.beta1, gan.beta2)
        )
        self.nets.load_discriminator_state(gan_dir)
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Tensor] = {}
        ctx.disks.mirror(work / CHECKPOINTS, ["*"])
        self.checkpoints = ctx.checkpoints(work / CHECKPOINTS, together=True)
        self.start = 0
        if (found := self.checkpoints.load()) is not None:
            self.start, state = found
            self.nets.load_state_dict(state["nets"])
            self.history, self.best = state["history"], state["best"]
            ctx.resumed = True
        self.nets.skips.draw = max(self.nets.skips.draw, draw)

    def save(self, step: int, monitor: Monitor) -> None:
        """A checkpoint as of after ``step`` steps, written by rank 0."""
        state = {"nets": self.nets.state_dict(), "history": self.history, "best": self.best}
        if self.main:
            monitor.flush()
            self.checkpoints.save(step, state)

    def measure(self, ctx: Context, step: int, monitor: Monitor) -> Measured:
        """Quick students on val, once per interval; keeps the generator where it is the best so far."""
        if self.history and self.history[-1]["step"] == step:  # before an interruption; its points are purged
            result = Measured(**self.history[-1])
            monitor.scalars(step, result.scalars())
            return result
        result = measure(ctx, self.nets.ema, step)
        if not self.history or ctx.config.matching.select == "last" or result.val > max(h["val"] for h in self.history):
            self.best = cpu_state(self.nets.ema)
        self.history.append(result.as_dict())
        monitor.scalars(step, result.scalars())
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
    matcher = Matcher(ctx, teachers_dir, logits_dir)

    def attempt(draw: int) -> dict[str, Any]:
        return match(ctx, work, matcher, Run(ctx, work, gan_dir, draw), provenance, on_interval)

    return going_back_once("matching", attempt, "lower --matching.lr, or raise --matching.temperature", ctx.say)


def match(
    ctx: Context,
    work: Path,
    matcher: Matcher,
    state: Run,
    provenance: dict[str, Any],
    on_interval: OnInterval | None,
) -> dict[str, Any]:
    """One attempt, from the last checkpoint."""
    m, world = ctx.config.matching, ctx.world
    images = ctx.images("train")
    monitor = ctx.monitor("matching", work, m.steps, start=state.start)

    def pause(step: int) -> bool:
        try:
            measured = state.measure(ctx, step, monitor)
            stops = on_interval is not None and world.is_main and on_interval(step, state.nets.ema, measured)
            return bool(world.broadcast(stops))
        except Preempted:
            state.save(step, monitor)
            raise

    if m.lambda_adv:
        images.expect(lambda step: matcher.dealer.batch(step, world.rank, world.size).samples, state.start, m.steps)

    def read(step: int) -> tuple[Any, ...]:
        groups = matcher.dealer.batch(step, world.rank, world.size)
        real = images.read(groups.samples) if m.lambda_adv else torch.empty(0)
        return groups, matcher.real_logits(groups), real

    batches = prefetch(read, state.start, m.steps, ctx.config.loader.prefetch)
    for step, (groups, real_logits, real) in enumerate(batches, state.start):
        if step % m.interval == 0 and pause(step):
            break
        vote = world.vote(state.checkpoints.due() and step + 1 < m.steps)
        scalars = train_step(ctx, state.nets, matcher, step, groups, real_logits, real)
        if step % m.interval == 0 or step == m.steps - 1:
            matcher.log(monitor, step)
        if due(step, m.steps):
            monitor.scalars(step, {**world.mean(scalars), "lr": cosine(step, m.steps, m.lr, m.lr / 10)})
        monitor.advance(step + 1, images=m.batch)
        ctx.say(state.nets.skips.line("matching", step + 1))
        vote.obey(partial(state.save, step + 1, monitor), sound=not state.nets.skips.in_a_row)
    else:
        pause(m.steps)
    monitor.close()
    if world.is_main:
        save_best(ctx, work, state, provenance)
    state.nets.close()
    return {
        "history": state.history,
        "selected": m.select,
        "skipped_steps": state.nets.skips.total,
        **state.checkpoints.costs(),
    }


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
    m, seed, slots = ctx.config.matching, nets.skips.seed(ctx.config.step_seed("matching")), groups.slots
    labels = torch.from_numpy(groups.labels).to(ctx.device)
    z = torch.from_numpy(normal(seed, "matching/z", step, slots, nets.generator.latent)).to(ctx.device)
    draws = torch.from_numpy(uniform(seed, "matching/augment", step, slots, AUGMENT_DRAWS))
    real_logits = real_logits.to(ctx.device)
    scalars: dict[str, Tensor] = {}
    cuts = nets.micro_batches(len(slots))
    # In one piece, the generator's one forward serves the discriminator too.
    fake = nets.g(z, labels) if len(cuts) == 1 else None
    real = mirrored(ctx, to_float(real_uint8, ctx.device), step, slots, seed, "matching/flip") if m.lambda_adv else None
    if real is not None:
        through = augmentation(ctx, seed, "matching/augment/d", step, slots)
        seen = nets.draw(z, labels) if fake is None else fake
        scalars |= nets.train_discriminator(real, seen, labels, m.gamma, through, m.lr_d)

    parts = []
    for i, p in enumerate(cuts):
        images = nets.g(z[p], labels[p]) if fake is None else fake
        side = Side(groups.part(i, len(cuts)), real_logits[p], draws[p], labels[p], None if real is None else real[p])
        of_part: dict[str, Tensor] = {}
        loss, gradient = image_gradient(partial(total_loss, ctx, nets, matcher, step, side, into=of_part), images)
        nets.g.backward((images * gradient).sum())
        parts.append({"loss": loss, **of_part})
    nets.step_generator(cosine(step, m.steps, m.lr, m.lr / 10), ema_decay(m.batch, m.ema_images))
    return {**mean_scalars(parts), **scalars}


@dataclass(frozen=True)
class Side:
    """What a micro-batch of generated images is compared with: groups, real logits [B, C], draws, labels [B], real images."""

    groups: Groups
    real_logits: Tensor
    draws: Tensor
    labels: Tensor
    real: Tensor | None


def total_loss(
    ctx: Context, nets: Adversaries, matcher: Matcher, step: int, side: Side, images: Tensor, into: dict[str, Tensor]
) -> Tensor:
    """L_G of float images [B, C, H, W]; its terms go to ``into``."""
    m, seed = ctx.config.matching, nets.skips.seed(ctx.config.step_seed("matching"))
    terms = matcher.loss(images, side.groups, side.real_logits, side.draws)
    loss = m.lambda_pair * terms["pair"] + m.lambda_mean * terms["mean"]
    if side.real is not None:
        through = augmentation(ctx, seed, "matching/augment/g", step, side.groups.slots)
        terms["adv"] = nets.generator_loss(side.real, images, side.labels, through)
        loss = loss + m.lambda_adv * terms["adv"]
    into.update({k: v.detach() for k, v in terms.items()})
    return loss
