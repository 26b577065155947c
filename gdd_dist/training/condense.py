"""Condensation of a fixed set: its latents are moved through the frozen generator, so that few images teach more.

The latents start at the draws that the teachers choose. Each step asks one teacher, in turn. Its loss has two terms: cross-entropy (each
image belongs to its class), and the distance of mean features (the images of a class together look like real ones, as in distribution
matching, Zhao & Bilen 2023). The second term keeps the images from becoming adversarial examples, which teach nothing.
Shapes: N images in whole classes, n images per class, L latent, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gdd_dist.data.augment import AUGMENT_DRAWS
from gdd_dist.data.images import to_uint8
from gdd_dist.data.noise import normal, uniform
from gdd_dist.models.generator import ImageGenerator
from gdd_dist.training.context import Context
from gdd_dist.training.soft_labels import best_draw
from gdd_dist.training.teacher_features import Features, features, real_features

START = 30
"""Draws from which the teachers choose each image's first latent."""
LR = 0.03
"""Learning rate of Adam, in standard deviations of a latent."""
PART = 512
"""Most images that are moved together, unless one class has more."""


def condensed(
    ctx: Context,
    generator: ImageGenerator,
    teachers: Sequence[nn.Module],
    ipc: int,
    seed: int,
    purpose: str,
    steps: int,
    tick: Callable[[int], None] = lambda done: None,
) -> Tensor:
    """Return a set of ``ipc`` images per class in the order of classes, uint8 [N, channels, H, W], after ``steps`` steps.

    All random numbers are functions of (seed, purpose, step, slot). The generator is frozen, in evaluation mode.
    ``tick``: gets how many of ``steps`` are done. A large set is moved in parts, each of which counts by its share of classes.
    """
    real = [real_features(ctx, teacher, seed, f"{purpose}/condense/real") for teacher in teachers]
    at_once, parts = max(1, PART // ipc), []
    for first in range(0, ctx.classes, at_once):
        classes = np.arange(first, min(first + at_once, ctx.classes))
        slots = np.arange(classes[0] * ipc, (classes[-1] + 1) * ipc)
        labels = torch.from_numpy(slots // ipc).to(ctx.device)
        z = first_latents(ctx, generator, teachers, labels, seed, purpose, slots).requires_grad_()
        optimizer = torch.optim.Adam([z], lr=LR)
        for step in range(steps):
            ctx.world.check_stop()
            which = step % len(teachers)
            draws = torch.from_numpy(uniform(seed, f"{purpose}/condense/augment", step, slots, AUGMENT_DRAWS))
            seen = ctx.augment(generator(z, labels), draws)
            loss = condensation(*features(ctx, teachers[which], seen), labels, real[which], ipc)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            tick(int(steps * first + (step + 1) * len(classes)) // ctx.classes)
        with torch.no_grad():
            parts.append(to_uint8(generator(z, labels)))
    return torch.cat(parts)


def condensation(feature: Tensor, logits: Tensor, labels: Tensor, real: Features, ipc: int) -> Tensor:
    """Return the loss of one teacher's features [N, F] and logits [N, C] for ``labels`` int64 [N], ``ipc`` of each class in a row.

    Cross-entropy + mean over classes of the squared distance of mean features, as a share of the real total variance.
    """
    mean = real.mean[labels[::ipc]]
    distance = (feature.view(-1, ipc, feature.shape[1]).mean(1) - mean).square().sum(1)
    return F.cross_entropy(logits, labels) + distance.mean() / real.variance


def first_latents(
    ctx: Context,
    generator: ImageGenerator,
    teachers: Sequence[nn.Module],
    labels: Tensor,
    seed: int,
    purpose: str,
    slots: np.ndarray,
) -> Tensor:
    """Return for each of ``labels`` int64 [N] the latent, of START draws, whose image has the highest teacher probability: float32 [N, L]."""
    draws = [torch.from_numpy(normal(seed, f"{purpose}/z", n, slots, generator.latent)) for n in range(START)]
    z = torch.stack(draws).to(ctx.device)
    with torch.no_grad():
        best = best_draw(teachers, (to_uint8(generator(part, labels)) for part in z), labels, ctx.precision)
    return z[best, torch.arange(len(labels), device=z.device)]
