"""Step: move the generator until the teachers answer its images as they answer real ones of the same class.

`matching_step` is the method: draw, generate, train the discriminator, compare with the cache, add the terms, step.
Shapes: B this rank's slots, in G groups of n that share a class and a teacher; L latent, C classes, H W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gdd_dist.config.steps import Inputs, refits
from gdd_dist.data.augment import AUGMENT_DRAWS
from gdd_dist.data.images import to_float
from gdd_dist.data.logit_cache import LogitCache
from gdd_dist.data.noise import normal, uniform
from gdd_dist.engines.precision import autocast
from gdd_dist.evaluation.quick_students import INTERVAL, Candidates, Measurement, best, measure, measure_once
from gdd_dist.models.files import (
    DISCRIMINATOR,
    GENERATOR,
    cpu_state,
    load_discriminator_network,
    load_generator_network,
    read_teachers,
    save_network,
)
from gdd_dist.models.gaussian import LinearGenerator
from gdd_dist.steps.matching_groups import Dealer, Groups
from gdd_dist.storage.store import CHECKPOINTS
from gdd_dist.training import loop, losses
from gdd_dist.training.adversaries import Adversaries, augmentation, ema_decay, mean_scalars, mirrored
from gdd_dist.training.context import Context
from gdd_dist.training.gaussian_fit import chosen
from gdd_dist.training.gaussian_refit import refit
from gdd_dist.training.sample_grid import sample_grid
from gdd_dist.training.schedules import cosine

REFIT = CHECKPOINTS + "/refit.safetensors"
"""The refitted Gaussian until the step ends."""


def run(ctx: Context, work: Path, inputs: Inputs) -> dict[str, Any]:
    """Match into ``work``: generator.safetensors. At intervals ``ctx.on_interval`` is told on rank 0."""
    pool = Pool(ctx, inputs.directories["teachers"], inputs.directories["logits"])
    others = beside(ctx, work, pool, inputs.directories["gaussian"])
    checkpoints = ctx.shared_checkpoints(work)
    matched = loop.train(
        ctx,
        lambda: Matching(ctx, work, pool, inputs.directories["gan"]),
        ctx.world,
        checkpoints,
        "matching",
        "lower --matching.lr, or raise --matching.temperature",
    )
    candidates = Candidates(matched.history, others)
    matched.finish(work, inputs, candidates)
    kept = {"history": matched.history, "others": others, "selected": ctx.config.matching.select}
    return {**kept, "skipped_steps": matched.skips.total, **checkpoints.costs()}


def beside(ctx: Context, work: Path, pool: Pool, gaussian_dir: Path) -> dict[str, dict[str, Any]]:
    """The candidates that are not trained here, measured on val: the Gaussian of each class, and that of what teachers choose."""
    found = {"gaussian": chosen(gaussian_dir)}
    if refits(ctx.config):
        result = measure_once(ctx, work / CHECKPOINTS / "refit.json", lambda: _refitted(ctx, work, pool, gaussian_dir))
        found["refit"] = result.as_dict()
        ctx.world.say(f"matching: refitted Gaussian, quick students {result.val:.1f} ± {result.stderr:.1f} % on val")
    return found


def _refitted(ctx: Context, work: Path, pool: Pool, gaussian_dir: Path) -> LinearGenerator:
    ctx.world.say("matching: the Gaussian is fitted to what the teachers choose of its draws")
    net, meta = load_generator_network(gaussian_dir / GENERATOR)
    assert isinstance(net, LinearGenerator)
    found = refit(ctx, ctx.watch(net), pool.last, ctx.config.matching.refit)
    if ctx.world.is_main:
        save_network(work / REFIT, found, {**meta, "arch": found.arch})
    return found


@dataclass(frozen=True)
class Batch:
    """This rank's share of a step: who stands where, the cache's answers to the real side of each pair, real images.

    ``real_logits``: float32 [B, C]; ``real``: uint8 [B, channels, H, W], None without the adversarial term.
    """

    groups: Groups
    real_logits: Tensor
    real: Tensor | None


def matching_step(
    ctx: Context, nets: Adversaries, pool: Pool, step: int, batch: Batch
) -> tuple[dict[str, Tensor], Tensor]:
    """One step. Returns the scalars loss, pair, mean, adv and the discriminator's, and the teachers' answers float32 [B, C]."""
    m, groups, slots = ctx.config.matching, batch.groups, batch.groups.slots
    real_logits = batch.real_logits.to(ctx.device)

    # Draw.
    seed = nets.skips.seed(ctx.config.step_seed("matching"))
    labels = torch.from_numpy(groups.labels).to(ctx.device)
    z = torch.from_numpy(normal(seed, "matching/z", step, slots, nets.generator.latent)).to(ctx.device)
    draws = torch.from_numpy(uniform(seed, "matching/augment", step, slots, AUGMENT_DRAWS))

    # Generate. In one piece, the generator's one forward serves the discriminator too.
    cuts = nets.micro_batches(len(slots))
    whole = nets.g(z, labels) if len(cuts) == 1 else None

    # The discriminator trains on.
    real, scalars, moved = None, dict[str, Tensor](), True
    if batch.real is not None:
        real = mirrored(ctx, to_float(batch.real, ctx.device), step, slots, seed, "matching/flip")
        fake = nets.draw(z, labels) if whole is None else whole
        through = augmentation(ctx, seed, "matching/augment/d", step, slots)
        scalars, moved = nets.train_discriminator(real, fake, labels, m.gamma, through, m.lr_d)

    parts, answers = [], []
    for i, p in enumerate(cuts):
        group = groups.part(i, len(cuts))

        def total(images: Tensor, p: slice = p, group: Groups = group) -> tuple[Tensor, dict[str, Tensor]]:
            # Compare with the cache.
            logits = pool.answer(images, group, draws[p])
            answers.append(logits.detach())
            terms = {
                "pair": losses.PAIR[m.loss](real_logits[p], logits, m.temperature),
                "mean": losses.mean_logit(pool.class_means(group), logits.view(-1, group.size, ctx.classes)),
            }
            # Add the terms.
            loss = m.lambda_pair * terms["pair"] + m.lambda_mean * terms["mean"]
            if real is not None:
                through = augmentation(ctx, seed, "matching/augment/g", step, group.slots)
                terms["adv"] = nets.generator_loss(real[p], images, labels[p], through)
                loss = loss + m.lambda_adv * terms["adv"]
            return loss, terms

        parts.append(nets.generator_backward(nets.g(z[p], labels[p]) if whole is None else whole, total))

    # Step.
    nets.step_generator(cosine(step, m.steps, m.lr, m.lr / 10), ema_decay(m.batch, m.ema_images), moved)
    return {**mean_scalars(parts), **scalars}, torch.cat(answers)


class Pool:
    """The frozen teachers and the cache of their answers to real images."""

    def __init__(self, ctx: Context, teachers_dir: Path, logits_dir: Path) -> None:
        m, pool = ctx.config.matching, read_teachers(teachers_dir)
        chosen = [t for t in pool if m.teachers == "all" or t.last]
        self._ctx, self._nets = ctx, {t.index: ctx.teacher(t) for t in chosen}
        self.last = [self._nets[t.index] for t in chosen if t.last]
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

    def class_means(self, groups: Groups) -> Tensor:
        """The mean raw logits of each group's class, of its teacher, over train: float32 [G, C]."""
        return self._means[torch.from_numpy(groups.teachers), torch.from_numpy(groups.classes)]

    def answer(self, images: Tensor, groups: Groups, draws: Tensor) -> Tensor:
        """Each group's teacher's logits float32 [B, C] of float images [B, channels, H, W], differentiable.

        Images are augmented by ``draws`` [B, AUGMENT_DRAWS]; a slot whose real view is plain stays plain itself.
        """
        ctx = self._ctx
        plain = torch.from_numpy(groups.views == 0).to(images.device)[:, None, None, None]
        seen = torch.where(plain, images, ctx.augment(images, draws))
        logits = images.new_zeros(len(images), ctx.classes)
        for teacher, places in groups.by_teacher():
            here = torch.from_numpy(places).to(images.device)
            with autocast(ctx.device, ctx.precision):
                answer = self._nets[teacher](seen[here])
            logits = logits.index_copy(0, here, answer.float())
        return logits


class Matching(loop.Trainee):
    """The networks under way, the measurements so far, and the best generator among them."""

    name = "matching"

    def __init__(self, ctx: Context, work: Path, pool: Pool, gan_dir: Path) -> None:
        gan = ctx.config.gan
        self._ctx, self._work, self._pool, self.steps = ctx, work, pool, ctx.config.matching.steps
        self._images = ctx.images("train")
        generator, self.meta = load_generator_network(gan_dir / GENERATOR)
        discriminator = load_discriminator_network(gan_dir / DISCRIMINATOR)
        self.nets = Adversaries(ctx, generator, discriminator, (gan.beta1, gan.beta2))
        self.nets.load_discriminator_state(gan_dir)
        self.skips = self.nets.skips
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Tensor] = {}

    def begin(self, start: int) -> None:
        """Open the monitor; the loader learns which real images come."""
        self.monitor = self._ctx.monitor("matching", self._work, self.steps, start=start)
        if self._ctx.config.matching.lambda_adv:
            self._images.expect(lambda step: self._groups(step).samples, start, self.steps)

    def _groups(self, step: int) -> Groups:
        return self._pool.dealer.batch(step, self._ctx.world.rank, self._ctx.world.size)

    def read(self, step: int) -> Batch:
        """Groups, the cache's answers, and the real images that the discriminator compares with."""
        groups = self._groups(step)
        real = self._images.read(groups.samples) if self._ctx.config.matching.lambda_adv else None
        return Batch(groups, self._pool.real_logits(groups), real)

    def train(self, step: int, batch: Batch) -> dict[str, Tensor]:
        """One step; at intervals both sides' standardized answers are shown: matching lays one histogram on the other."""
        scalars, answers = matching_step(self._ctx, self.nets, self._pool, step, batch)
        if self._ctx.world.is_main and (step % self._ctx.config.matching.interval == 0 or step == self.steps - 1):
            for side, logits in (("real", batch.real_logits), ("generated", answers)):
                values = losses.standardize(logits).cpu().numpy()
                self.monitor.histogram(f"teacher_answers/{side}", values, step)
        return scalars

    def before_step(self, step: int) -> None:
        """Measure at each interval and at the end; the generator that does best is kept."""
        m = self._ctx.config.matching
        if step % m.interval and step != m.steps:
            return
        measured = self._measured(step)
        if self._ctx.on_interval is not None and self._ctx.world.is_main:
            self._ctx.on_interval(step, self.nets.ema, measured)

    def _measured(self, step: int) -> Measurement:
        """Quick students on val, once per interval."""
        if self.history and self.history[-1]["step"] == step:  # before an interruption; its points are purged
            found = Measurement(**self.history[-1])
            self.monitor.scalars(step, found.scalars())
            return found
        found = measure(self._ctx, self.nets.ema, step)
        self.history.append(found.as_dict())
        if best(self.history, self._ctx.config.matching.select) is self.history[-1]:
            self.best = cpu_state(self.nets.ema)
        self.monitor.scalars(step, found.scalars())
        if self._ctx.world.is_main:
            self.monitor.picture("samples", sample_grid(self._ctx, self.nets.ema), step)
        self._ctx.world.say(
            f"matching: step {step}, quick students {found.val:.1f} ± {found.stderr:.1f} % on val, shortcut gap {found.gap:.1f}"
        )
        return found

    def log(self, step: int, scalars: dict[str, float]) -> None:
        """Losses and learning rate."""
        m = self._ctx.config.matching
        self.monitor.scalars(step, {**scalars, "lr": cosine(step, m.steps, m.lr, m.lr / 10)})

    def after_step(self, done: int) -> None:
        """Progress."""
        self.monitor.advance(done, images=self._ctx.config.matching.batch)

    def state_dict(self) -> dict[str, Any]:
        """Networks, measurements, the best generator."""
        return {"nets": self.nets.state_dict(), "history": self.history, "best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What ``state_dict`` gave."""
        self.nets.load_state_dict(state["nets"])
        self.history, self.best = state["history"], state["best"]

    def close(self) -> None:
        """Free the engines."""
        self.nets.close()

    def finish(self, work: Path, inputs: Inputs, candidates: Candidates) -> None:
        """Write the selected generator as one self-contained file: another than an interval's, where none did better on val."""
        self.monitor.close()
        if self._ctx.world.is_main:
            self.nets.ema.load_state_dict(self.best)
            net, meta, found = self.nets.ema, self.meta, candidates.kept(self._ctx.config.matching.select)
            if found and found[0] != INTERVAL:
                others = {"gaussian": inputs.directories["gaussian"] / GENERATOR, "refit": work / REFIT}
                net, meta = load_generator_network(others[found[0]])
                self._ctx.world.say(
                    f"matching: {found[0]} did better on val ({found[1]['val']:.1f} %) than any interval: it is kept"
                )
            about = {"provenance": inputs.provenance, "history": candidates.history, "others": candidates.others}
            save_network(work / GENERATOR, net, {**meta, **about})
        self.close()
