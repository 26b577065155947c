"""What the gan and matching steps share: two engines, the running mean of the generator, one discriminator step."""

from __future__ import annotations

import copy
import hashlib
import io
import math
import pickle
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gdd_dist.data.augment import AUGMENT_DRAWS, augment
from gdd_dist.data.images import to_float
from gdd_dist.data.noise import uniform
from gdd_dist.engines.build import build_engine
from gdd_dist.engines.interface import Engine
from gdd_dist.engines.nonfinite import poisoned
from gdd_dist.engines.precision import autocast
from gdd_dist.models.discriminator import Discriminator
from gdd_dist.models.files import DISCRIMINATOR, save_network
from gdd_dist.models.generator import ImageGenerator
from gdd_dist.storage.json_files import again
from gdd_dist.training import losses
from gdd_dist.training.context import Context
from gdd_dist.training.optimizers import Adam
from gdd_dist.training.skipped_steps import Skips
from sharding.errors import UserError
from sharding.files import write_atomic

DISCRIMINATOR_STATE = "discriminator-state.pt"
Augmentation = Callable[[Tensor], Tensor]
ImageLoss = Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]
"""Float images [B, C, H, W] → a scalar, and its terms to be logged."""


class Adversaries:
    """Generator and discriminator on their engines, and the generator's running mean (EMA)."""

    def __init__(
        self, ctx: Context, generator: ImageGenerator, discriminator: Discriminator, betas: tuple[float, float]
    ) -> None:
        # The copy is made before `watch`: a copy would keep the hook, and then images would be counted twice.
        self.ema = ctx.watch(copy.deepcopy(generator)).eval().requires_grad_(False)
        self.generator, self.discriminator = ctx.watch(ctx.compiled(generator)), ctx.watch(discriminator)
        # Not for classifiers, whose group norms would convert it back, nor for DeepSpeed, which splits weights as they are in memory.
        on_gpu, wanted = ctx.device.type == "cuda", ctx.config.channels_last
        if (on_gpu if wanted is None else wanted) and ctx.config.engine == "ddp":
            channels_last(self.generator, self.discriminator, self.ema)
        # DeepSpeed splits the weights, and decides itself which steps to skip.
        adam = partial(_adam, betas=betas, fused=ctx.config.engine == "ddp")
        label = torch.zeros(1, dtype=torch.int64, device=ctx.device)
        latent = label.new_zeros(1, generator.latent).float()
        self.g: Engine = build_engine(
            ctx.config, ctx.world, ctx.precision, self.generator, adam(generator), (latent, label)
        )
        size, channels = ctx.manifest.height, ctx.manifest.channels
        image = label.new_zeros(1, channels, size, size).float()
        self.d: Engine = build_engine(
            ctx.config, ctx.world, ctx.precision, self.discriminator, adam(discriminator), (image, label)
        )
        self._ctx = ctx
        self.skips = Skips()
        buffers = {name for name, _ in generator.named_buffers()}
        self._fixed = {name: value.cpu() for name, value in generator.state_dict().items() if name in buffers}
        """Weights that no step changes: the linear part of a generator that starts at the Gaussian."""

    def micro_batches(self, slots: int) -> list[slice]:
        """Return this rank's ``slots`` of a step, split into the micro-batches for which the engines were made."""
        share = slots // self._ctx.config.accumulate
        return [slice(i, i + share) for i in range(0, slots, share)]

    @torch.no_grad()
    def update_ema(self, decay: float) -> None:
        """ema ← decay · ema + (1 - decay) · generator."""
        with self.g.gathered() as weights:
            torch._foreach_lerp_(list(self.ema.parameters()), [p.detach() for p in weights], 1 - decay)

    @torch.no_grad()
    def draw(self, z: Tensor, labels: Tensor) -> Tensor:
        """Return images drawn in the engine's precision, without a graph: float32."""
        with autocast(self._ctx.device, self._ctx.precision):
            images: Tensor = self.generator(z, labels)
        return images.float()

    def train_discriminator(
        self, real: Tensor, fake: Tensor, labels: Tensor, gamma: float, augment: Augmentation, lr: float
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Do one step of the relativistic loss with penalties γ/2 (R1 + R2) (R3GAN, Huang et al. 2024, eq. 7); pairs share a label.

        Both real and generated images are augmented, the real ones first. float [B, C, H, W] in [-1, 1]. Returns the scalars to log, and whether
        the discriminator moved, a bool scalar.
        """
        real, fake = augment(real).detach(), augment(fake.detach()).detach()
        parts = self.micro_batches(len(labels))
        scalars = mean_scalars([self._discriminator_backward(real[p], fake[p], labels[p], gamma) for p in parts])
        return scalars, self.d.step(lr)

    def _discriminator_backward(self, real: Tensor, fake: Tensor, labels: Tensor, gamma: float) -> dict[str, Tensor]:
        # One forward and one double backward for real and generated images together: scores do not depend on other images of the batch.
        images = torch.cat((real, fake)).requires_grad_()
        scores = self.d(images, torch.cat((labels, labels)))
        real_scores, fake_scores = scores.chunk(2)
        loss = losses.relativistic_discriminator(real_scores, fake_scores)
        (gradients,) = torch.autograd.grad(scores.sum(), images, create_graph=True)
        r1, r2 = map(losses.zero_centred_penalty, gradients.chunk(2))
        self.d.backward(loss + 0.5 * gamma * (r1 + r2))
        return {
            "loss_d": loss.detach(),
            "r1": r1.detach(),
            "r2": r2.detach(),
            "score_gap": (real_scores - fake_scores).detach().mean(),
        }

    def generator_loss(self, real: Tensor, fake: Tensor, labels: Tensor, augment: Augmentation) -> Tensor:
        """Return the relativistic generator loss of ``fake``, differentiable with respect to the images."""
        with torch.no_grad():
            real_scores = self._scores(augment(real), labels)
        return losses.relativistic_generator(real_scores, self._scores(augment(fake), labels))

    def generator_backward(self, images: Tensor, loss: ImageLoss) -> dict[str, Tensor]:
        """Propagate the gradient of ``loss`` back through the generator that drew float ``images`` [B, C, H, W].

        Returns the terms of the loss, and their sum as "loss", detached.
        """
        value, terms, gradient = image_gradient(loss, images)
        self.g.backward((images * gradient).sum())
        return {"loss": value, **terms}

    def step_generator(self, lr: float, decay: float, others_moved: Tensor | None) -> None:
        """Update the generator and its EMA. ``others_moved``: whether the discriminator moved in this step; None if it was not trained.

        Raises Diverged when too many steps in a row moved nothing.
        """
        moved = self.g.step(lr)
        self.update_ema(decay)
        self.skips.note(moved if others_moved is None else moved & others_moved)

    def _scores(self, images: Tensor, labels: Tensor) -> Tensor:
        with autocast(self._ctx.device, self._ctx.precision):
            scores: Tensor = self.discriminator(images, labels)
        return scores.float()

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a checkpoint needs; complete on rank 0."""
        g = self.g.state_dict()
        g["module"], ema = self._trained(g["module"]), self._trained(self.ema.state_dict())
        state = {"g": g, "d": self.d.state_dict(), "ema": ema, "skips": self.skips.state_dict()}
        return {**state, "fixed": self._fixed_hash()} if self._fixed else state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a result of ``state_dict``. Raises UserError if it belongs to a generator with another linear part."""
        if state.get("fixed") != (self._fixed_hash() if self._fixed else None):
            raise UserError("the checkpoint belongs to a generator with another linear part; remove its directory")
        self.g.load_state_dict({**state["g"], "module": {**state["g"]["module"], **self._fixed}})
        self.d.load_state_dict(state["d"])
        self.ema.load_state_dict({**state["ema"], **self._fixed})
        self.skips.load_state_dict(state["skips"])

    def _trained(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the generator's ``weights`` without its fixed part, which checkpoints do not repeat."""
        return {name: value for name, value in weights.items() if name not in self._fixed}

    def _fixed_hash(self) -> str:
        """Return the SHA-256 of the fixed part's values."""
        found = hashlib.sha256()
        for name, value in sorted(self._fixed.items()):
            found.update(name.encode() + value.numpy().tobytes())
        return found.hexdigest()

    def save_discriminator(self, directory: Path, write: bool) -> None:
        """Save the discriminator and its engine's state, with which matching continues. All ranks call it; those with ``write`` write."""
        state = self.d.state_dict()
        if write:
            meta = {"format": "gdd-discriminator/1", "arch": self.discriminator.arch}
            save_network(directory / DISCRIMINATOR, state["module"], meta)
            buffer = io.BytesIO()
            torch.save(state, buffer)
            write_atomic(directory / DISCRIMINATOR_STATE, buffer.getvalue())

    def load_discriminator_state(self, directory: Path) -> None:
        """Load what ``save_discriminator`` wrote. Raises UserError naming a damaged file."""
        path = directory / DISCRIMINATOR_STATE
        try:
            self.d.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        except (OSError, RuntimeError, KeyError, ValueError, pickle.UnpicklingError) as e:
            raise UserError(f"cannot read {path} ({e}); {again(path)}") from e

    def close(self) -> None:
        """Free the engines."""
        self.g.close()
        self.d.close()


def _adam(net: torch.nn.Module, betas: tuple[float, float], fused: bool) -> torch.optim.Adam:
    return Adam(net.parameters(), lr=1e-4, betas=betas, fused=fused)


def channels_last(*networks: torch.nn.Module) -> None:
    """Convert convolutions to the channels-last memory format. Results stay the same, up to rounding."""
    for net in networks:
        net.to(memory_format=torch.channels_last)


def mean_scalars(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the means over equal micro-batches."""
    return parts[0] if len(parts) == 1 else {k: torch.stack([p[k] for p in parts]).mean(0) for k in parts[0]}


def ema_decay(batch: int, half_life: float, images_seen: float = math.inf) -> float:
    """Return the EMA's decay of a step of ``batch`` images, for a half-life in images of at most a twentieth of those seen (StyleGAN2-ADA)."""
    return float(0.5 ** (batch / max(min(half_life, images_seen * 0.05), 1e-8)))


class RealSide(NamedTuple):
    """What the discriminator needs for the B slots of a step.

    ``images``: real ones, uint8 [B, channels, H, W]. ``mirror``: random numbers that mirror them, float32 [B, AUGMENT_DRAWS]. ``d`` and
    ``g``: of the augmentation in the discriminator's step and in the generator's, float32 [B, AUGMENT_DRAWS + 1].
    """

    images: Tensor
    mirror: Tensor
    d: Tensor
    g: Tensor

    @classmethod
    def drawn(cls, images: Tensor, seed: int, step_name: str, step: int, slots: np.ndarray) -> RealSide:
        """Return ``images`` with the random numbers of ``slots`` int64 [B] in a step of "gan" or "matching"."""

        def draws(purpose: str, n: int) -> Tensor:
            return torch.from_numpy(uniform(seed, f"{step_name}/{purpose}", step, slots, n))

        seen_through = (draws(f"augment/{side}", AUGMENT_DRAWS + 1) for side in "dg")
        return cls(images, draws("flip", AUGMENT_DRAWS), *seen_through)


def augmentation(ctx: Context, draws: Tensor) -> Augmentation:
    """Return the discriminator's augmentation for random numbers float32 [B, AUGMENT_DRAWS + 1]; a share ``augment_p`` of images gets it."""
    g = ctx.config.gan
    chosen = (draws[:, -1] < g.augment_p)[:, None, None, None]

    def apply(images: Tensor) -> Tensor:
        changed = augment(images, draws[:, :AUGMENT_DRAWS], flip=False, ops=g.augment, fill=ctx.fill)
        return torch.where(chosen, changed, images)

    return apply


def mirrored(ctx: Context, real: RealSide) -> Tensor:
    """Return real images as floats [B, C, H, W] in [-1, 1], mirrored at random if the data allows it."""
    images = to_float(real.images, ctx.device)
    return augment(images, real.mirror, flip=True, ops="none", fill=0.0) if ctx.config.loader.flip else images


def image_gradient(loss: ImageLoss, images: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Return (loss, its terms, d loss / d images), all detached, at float ``images`` [B, C, H, W]; no weight gets a gradient.

    A loss therefore does not need the engine: the generator's engine propagates the gradient of the images to its weights.
    """
    leaf = images.detach().requires_grad_()
    value, terms = loss(leaf)
    (gradient,) = torch.autograd.grad(poisoned(value), leaf)
    return value.detach(), {name: term.detach() for name, term in terms.items()}, gradient.detach()
