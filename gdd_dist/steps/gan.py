"""Step: the conditional GAN, with relativistic pairs and zero-centred penalties (R3GAN). The result is the generator's EMA.

Shapes: B samples of this rank, L latent, C classes, H W pixels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gdd_dist.config.settings import Config, Gan
from gdd_dist.config.steps import Inputs
from gdd_dist.data.noise import normal
from gdd_dist.data.order import balanced_rows
from gdd_dist.models.discriminator import Discriminator
from gdd_dist.models.files import GENERATOR, load_generator_network, save_network
from gdd_dist.models.gaussian import LinearGenerator
from gdd_dist.models.generator import ImageGenerator
from gdd_dist.models.residual_generator import new_generator
from gdd_dist.training import loop
from gdd_dist.training.adversaries import Adversaries, RealSide, augmentation, ema_decay, mean_scalars, mirrored
from gdd_dist.training.context import Context, seeded, train_order
from gdd_dist.training.sample_grid import as_png, sample_grid
from gdd_dist.training.schedules import cosine
from sharding.files import write_atomic


def run(ctx: Context, work: Path, inputs: Inputs) -> dict[str, Any]:
    """Train, and write generator.safetensors (EMA), discriminator.safetensors and its training state into ``work``."""
    checkpoints = ctx.shared_checkpoints(work)
    remedy = "lower --gan.lr, or raise --gan.gamma"
    trained = loop.train(ctx, lambda: GanTraining(ctx, work, inputs), ctx.world, checkpoints, "gan", remedy)
    trained.finish(work, inputs)
    return {"skipped_steps": trained.skips.total, **checkpoints.costs()}


class Batch(NamedTuple):
    """This rank's share of a step: labels int64 [B], latents float32 [B, L] for each network's step, real images with their draws."""

    labels: Tensor
    z_d: Tensor
    z_g: Tensor
    real: RealSide


class GanTraining(loop.Trainee):
    """Generator and discriminator, trained on this rank's samples of each global batch."""

    name = "gan"

    def __init__(self, ctx: Context, work: Path, inputs: Inputs) -> None:
        g, world = ctx.config.gan, ctx.world
        self._ctx, self._work, self.steps = ctx, work, g.steps
        self._images = ctx.images("train")
        self._sampling = Sampling(ctx.config, self._images.labels, self._images.shards.shard_samples, ctx.classes)
        self.nets = Adversaries(ctx, *networks(ctx, inputs), (g.beta1, g.beta2))
        self.skips = self.nets.skips
        share = g.batch // world.size
        self.slots = np.arange(world.rank * share, (world.rank + 1) * share)

    def begin(self, start: int) -> None:
        """Open the monitor, and announce to the loader which images will be read."""
        self.monitor = self._ctx.monitor("gan", self._work, self.steps, start=start)
        self._images.expect(self._samples, start, self.steps)

    def _samples(self, step: int) -> np.ndarray:
        return self._sampling.batch(step, self._ctx.world.rank, self._ctx.world.size)

    def read(self, step: int) -> Batch:
        """Read real images with their labels, latents and random draws."""
        indices, seed = self._samples(step), self.skips.seed(self._ctx.config.step_seed("gan"))

        def latents(purpose: str) -> Tensor:
            return torch.from_numpy(normal(seed, purpose, step, self.slots, self.nets.generator.latent))

        real = RealSide.drawn(self._images.read(indices), seed, "gan", step, self.slots)
        labels = torch.from_numpy(self._images.labels[indices])
        return self._ctx.sent(Batch(labels, latents("gan/z/d"), latents("gan/z/g"), real))

    def train(self, step: int, batch: Batch) -> dict[str, Tensor]:
        """Make one step of each network."""
        return gan_step(self._ctx, self.nets, step, batch)

    def log(self, step: int, scalars: dict[str, float]) -> None:
        """Log losses, learning rate, and weight of the penalties."""
        g = self._ctx.config.gan
        rates = {"lr": cosine(step, g.steps, g.lr, g.lr_final), "gamma": penalty(g, step)}
        self.monitor.scalars(step, {**scalars, **rates})

    def after_step(self, done: int) -> None:
        """Show progress, and at intervals a grid of samples."""
        if self._ctx.world.is_main and shows_grid(self._ctx.config.gan, done - 1):
            picture = sample_grid(self._ctx, self.nets.ema)
            self.monitor.picture("samples", picture, done - 1)
            if done == self.steps:
                self._show(picture)
        self.monitor.advance(done, images=self._ctx.config.gan.batch)

    def _show(self, picture: np.ndarray) -> None:
        """Write OUT/samples-gan.png, long before the report. It is outside the step's directory, whose files never change."""
        path = self._ctx.out / "samples-gan.png"
        write_atomic(path, as_png(picture))
        self._ctx.world.say(f"gan: samples of the last step, a row for each class, before matching: {path}")

    def state_dict(self) -> dict[str, Any]:
        """Return networks, optimizers, EMA and skipped steps."""
        return self.nets.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the result of ``state_dict``."""
        self.nets.load_state_dict(state)

    def close(self) -> None:
        """Free the engines."""
        self.nets.close()

    def finish(self, work: Path, inputs: Inputs) -> None:
        """Write both networks, with which matching continues."""
        ctx, ema = self._ctx, self.nets.ema
        self.monitor.close()
        self.nets.save_discriminator(work, ctx.world.is_main)
        if ctx.world.is_main:
            save_network(work / GENERATOR, ema, ctx.generator_meta(ema, inputs.provenance))
        self.close()


def gan_step(ctx: Context, nets: Adversaries, step: int, batch: Batch) -> dict[str, Tensor]:
    """Make one step of each network on this rank's share. Returns the scalars to log."""
    g, labels = ctx.config.gan, batch.labels
    lr, gamma = cosine(step, g.steps, g.lr, g.lr_final), penalty(g, step)
    real, fake = mirrored(ctx, batch.real), nets.draw(batch.z_d, labels)
    scalars, moved = nets.train_discriminator(real, fake, labels, gamma, augmentation(ctx, batch.real.d), lr)

    parts = []
    for p in nets.micro_batches(len(labels)):

        def loss(images: Tensor, p: slice = p) -> tuple[Tensor, dict[str, Tensor]]:
            return nets.generator_loss(real[p], images, labels[p], augmentation(ctx, batch.real.g[p])), {}

        parts.append({"loss_g": nets.generator_backward(nets.g(batch.z_g[p], labels[p]), loss)["loss"]})
    nets.step_generator(lr, ema_decay(g.batch, g.ema_images, (step + 1) * g.batch), moved)
    return {**mean_scalars(parts), **scalars}


def shows_grid(g: Gan, step: int) -> bool:
    """Whether TensorBoard gets a grid of samples after this step: the first, each ``grid_interval``, the last."""
    return step in (0, g.steps - 1) or (step + 1) % g.grid_interval == 0


def penalty(g: Gan, step: int) -> float:
    """Return the weight of the penalties, which changes log-linearly from ``gamma`` to ``gamma_final``."""
    if g.gamma <= 0 or g.gamma_final <= 0:
        return g.gamma + (g.gamma_final - g.gamma) * step / g.steps
    return float(g.gamma * (g.gamma_final / g.gamma) ** (step / g.steps))


def networks(ctx: Context, inputs: Inputs) -> tuple[ImageGenerator, Discriminator]:
    """Return new networks, initialised from the step's seed; with ``gan.start gaussian`` the generator draws that step's images."""
    g, seed = ctx.config.gan, ctx.config.step_seed("gan")
    shape: dict[str, Any] = {"classes": ctx.classes, "channels": ctx.manifest.channels, "size": ctx.manifest.height}
    linear = load_generator_network(inputs.directories["gaussian"] / GENERATOR)[0] if g.start == "gaussian" else None
    assert linear is None or isinstance(linear, LinearGenerator)
    with seeded(seed, "gan/generator"):
        generator = new_generator(linear, **shape, latent=g.latent, width=g.width, blocks=g.blocks, patch=g.patch)
    with seeded(seed, "gan/discriminator"):
        discriminator = Discriminator(**shape, width=g.d_width, blocks=g.d_blocks, patch=g.patch)
    return generator, discriminator


class Sampling:
    """Which real images form a batch: the order over train, with rare classes repeated so that classes are balanced."""

    def __init__(self, config: Config, labels: np.ndarray, shard_samples: tuple[int, ...], classes: int) -> None:
        self._rows = balanced_rows(labels, classes)
        if self._rows is not None:  # repeated samples stay in their shard
            ends = np.cumsum(shard_samples)
            shards = np.searchsorted(ends, self._rows, side="right")
            shard_samples = tuple(np.bincount(shards, minlength=len(shard_samples)).tolist())
        self.order = train_order(config, "gan", shard_samples, "gan/order")

    def batch(self, step: int, rank: int, world: int) -> np.ndarray:
        """Return the sample numbers of this rank's part of the batch, int64."""
        places = self.order.batch(step, rank, world)
        return places if self._rows is None else self._rows[places]
