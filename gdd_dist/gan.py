"""Step: the conditional GAN. Relativistic pairs with zero-centred penalties (R3GAN); what is kept is the generator's EMA."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gdd_dist.adversarial import Adversaries, augmentation, ema_decay, mean_scalars, mirrored
from gdd_dist.artifacts import CHECKPOINTS
from gdd_dist.context import Context, seeded, train_order
from gdd_dist.data.loader import prefetch, to_float
from gdd_dist.data.order import balanced_rows, normal
from gdd_dist.engines import image_gradient
from gdd_dist.finite import going_back_once
from gdd_dist.fit import cosine
from gdd_dist.models.discriminator import Discriminator
from gdd_dist.models.generator import Generator
from gdd_dist.monitor import due
from gdd_dist.networks import GENERATOR, save_network
from gdd_dist.pictures import sample_grid
from gdd_dist.settings import Config, Gan

VERSION = 2


def settings(config: Config) -> dict[str, Any]:
    """What shapes the GAN's numbers."""
    loader = config.shaping("loader")
    return {**config.shaping("gan"), "loader": {k: loader[k] for k in ("streams", "window", "flip")}}


class Sampling:
    """Which real image stands in which slot: the order over train, with rare classes repeated so that classes come evenly."""

    def __init__(self, config: Config, labels: np.ndarray, shard_samples: tuple[int, ...], classes: int) -> None:
        self._rows = balanced_rows(labels, classes)
        if self._rows is not None:  # repeats stay in their shard
            ends = np.cumsum(shard_samples)
            shards = np.searchsorted(ends, self._rows, side="right")
            shard_samples = tuple(np.bincount(shards, minlength=len(shard_samples)).tolist())
        self.order = train_order(config, "gan", shard_samples, "gan/order")

    def batch(self, step: int, rank: int, world: int) -> np.ndarray:
        """Sample numbers of this rank's slots, int64."""
        places = self.order.batch(step, rank, world)
        return places if self._rows is None else self._rows[places]


def networks(ctx: Context) -> tuple[Generator, Discriminator]:
    """Freshly initialised, as functions of the step's seed."""
    g, seed = ctx.config.gan, ctx.config.step_seed("gan")
    shape: dict[str, Any] = {"classes": ctx.classes, "channels": ctx.manifest.channels, "size": ctx.manifest.height}
    with seeded(seed, "gan/generator"):
        generator = Generator(**shape, latent=g.latent, width=g.width, blocks=g.blocks, patch=g.patch)
    with seeded(seed, "gan/discriminator"):
        discriminator = Discriminator(**shape, width=g.d_width, blocks=g.d_blocks, patch=g.patch)
    return generator, discriminator


def train_step(
    ctx: Context, nets: Adversaries, step: int, slots: np.ndarray, real: Tensor, labels: Tensor
) -> dict[str, Tensor]:
    """One step of each network on this rank's slots; returns scalars."""
    g, seed = ctx.config.gan, nets.skips.seed(ctx.config.step_seed("gan"))
    lr, gamma = cosine(step, g.steps, g.lr, g.lr_final), penalty(g, step)

    def latents(purpose: str) -> Tensor:
        return torch.from_numpy(normal(seed, purpose, step, slots, g.latent)).to(ctx.device)

    with torch.no_grad():
        fake = nets.draw(latents("gan/z/d"), labels)
    scalars = nets.train_discriminator(
        real, fake, labels, gamma, augmentation(ctx, seed, "gan/augment/d", step, slots), lr
    )
    z, parts = latents("gan/z/g"), []
    for p in nets.micro_batches(len(slots)):
        fake, seen_through = nets.g(z[p], labels[p]), augmentation(ctx, seed, "gan/augment/g", step, slots[p])
        part_loss = partial(nets.generator_loss, real[p], labels=labels[p], augment=seen_through)
        loss, gradient = image_gradient(part_loss, fake)
        nets.g.backward((fake * gradient).sum())
        parts.append({"loss_g": loss})
    nets.step_generator(lr, ema_decay(g.batch, g.ema_images, (step + 1) * g.batch))
    return {**mean_scalars(parts), **scalars}


def shows_grid(g: Gan, step: int) -> bool:
    """Whether TensorBoard gets a grid of samples after this step: the first, each ``grid_interval``, the last."""
    return step in (0, g.steps - 1) or (step + 1) % g.grid_interval == 0


def penalty(g: Gan, step: int) -> float:
    """The weight of the penalties, from ``gamma`` to ``gamma_final`` along a straight line in its logarithm."""
    if g.gamma <= 0 or g.gamma_final <= 0:
        return g.gamma + (g.gamma_final - g.gamma) * step / g.steps
    return float(g.gamma * (g.gamma_final / g.gamma) ** (step / g.steps))


def run(ctx: Context, work: Path, provenance: dict[str, Any]) -> dict[str, Any]:
    """Train into ``work``: generator.safetensors (EMA), discriminator.safetensors and their state to go on from."""
    remedy = "lower --gan.lr, or raise --gan.gamma"
    return going_back_once("gan", partial(train, ctx, work, provenance), remedy, ctx.say)


def train(ctx: Context, work: Path, provenance: dict[str, Any], draw: int) -> dict[str, Any]:
    """One attempt, from the last checkpoint; ``draw``: of the noise."""
    g, world, images = ctx.config.gan, ctx.world, ctx.images("train")
    sampling = Sampling(ctx.config, images.labels, images.shards.shard_samples, ctx.classes)
    nets = Adversaries(ctx, *networks(ctx), (g.beta1, g.beta2))
    ctx.disks.mirror(work / CHECKPOINTS, ["*"])
    checkpoints = ctx.checkpoints(work / CHECKPOINTS, together=True)
    start = 0
    if (found := checkpoints.load()) is not None:
        start, state = found
        nets.load_state_dict(state)
        ctx.resumed = True
    nets.skips.draw = max(nets.skips.draw, draw)
    share = g.batch // world.size
    slots = np.arange(world.rank * share, (world.rank + 1) * share)
    monitor = ctx.monitor("gan", work, g.steps, start=start)

    def save(step: int) -> None:
        state = nets.state_dict()
        if world.is_main:
            monitor.flush()
            checkpoints.save(step, state)

    mine = partial(sampling.batch, rank=world.rank, world=world.size)
    images.expect(mine, start, g.steps)

    def read(step: int) -> tuple[Tensor, ...]:
        indices = mine(step)
        return images.read(indices), torch.from_numpy(images.labels[indices])

    for step, (batch, labels) in enumerate(prefetch(read, start, g.steps, ctx.config.loader.prefetch), start):
        vote = world.vote(checkpoints.due() and step + 1 < g.steps)
        real = mirrored(ctx, to_float(batch, ctx.device), step, slots, ctx.config.step_seed("gan"), "gan/flip")
        scalars = train_step(ctx, nets, step, slots, real, labels.to(ctx.device))
        if due(step, g.steps):
            monitor.scalars(
                step, {**world.mean(scalars), "lr": cosine(step, g.steps, g.lr, g.lr_final), "gamma": penalty(g, step)}
            )
        if world.is_main and shows_grid(g, step):
            monitor.picture("samples", sample_grid(ctx, nets.ema), step)
        monitor.advance(step + 1, images=g.batch)
        ctx.say(nets.skips.line("gan", step + 1))
        vote.obey(partial(save, step + 1), sound=not nets.skips.in_a_row)
    world.vote().obey(partial(save, g.steps))  # a signal that came in the last step
    monitor.close()
    nets.save_discriminator(work, world.is_main)
    if world.is_main:
        meta = {
            "format": "gdd-generator/1",
            "arch": nets.ema.arch,
            "classes": list(ctx.manifest.classes),
            "normalization": {"range": [-1, 1], "mean": ctx.mean, "std": ctx.std},  # of train's pixels in that range
            "provenance": provenance,
        }
        save_network(work / GENERATOR, nets.ema, meta)
    nets.close()
    return {"skipped_steps": nets.skips.total, **checkpoints.costs()}
