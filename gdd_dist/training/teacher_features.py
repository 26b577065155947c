"""Features of a teacher: the inputs of its last linear layer. Their class means say what the images of a class look like together.

Shapes: N images, C classes, F features.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from gdd_dist.data.augment import AUGMENT_DRAWS
from gdd_dist.data.images import to_float
from gdd_dist.data.noise import permutation, uniform
from gdd_dist.engines.precision import autocast
from gdd_dist.training.context import Context

REAL = 128
"""Most real images of a class from which each teacher's mean features are taken."""


class Features(NamedTuple):
    """A teacher's features of real images: ``mean`` float32 [C, F] by class, and the total ``variance`` within classes, a scalar."""

    mean: Tensor
    variance: Tensor


def features(ctx: Context, teacher: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return (the inputs of the teacher's last linear layer, float32 [N, F]; its logits, float32 [N, C]) of float images."""
    kept: list[Tensor] = []
    last = [layer for layer in teacher.modules() if isinstance(layer, nn.Linear)][-1]
    hook = last.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
    # A compiled forward would not call the hook.
    eager = torch.compiler.set_stance("force_eager") if ctx.config.compile else nullcontext()
    try:
        with eager, autocast(images.device, ctx.precision):
            logits = teacher(images)
    finally:
        hook.remove()
    return kept[0].float(), logits.float()


@torch.no_grad()
def real_features(ctx: Context, teacher: nn.Module, seed: int, purpose: str, views: int = 0) -> Features:
    """Return a teacher's features of training images, at most REAL of each class. Each rank forwards all of them.

    Random numbers are functions of (seed, purpose, class). One of ``views`` images is not augmented; with 0 all are. A class without
    images gets the mean of the others.
    """
    images, means, variances = ctx.images("train"), dict[int, Tensor](), []
    for y in np.unique(images.labels).tolist():
        members = np.flatnonzero(images.labels == y)
        chosen = members[permutation(seed, purpose, y, len(members))[:REAL]]
        draws = torch.from_numpy(uniform(seed, purpose, y, np.arange(len(chosen)), AUGMENT_DRAWS))
        plain = to_float(images.read(chosen), ctx.device)
        seen = ctx.augment(plain, draws)
        if views:
            seen[::views] = plain[::views]
        found, _ = features(ctx, teacher, seen)
        means[y] = found.mean(0)
        variances.append(found.var(0, correction=0).sum())
    others = torch.stack(list(means.values())).mean(0)
    mean = torch.stack([means.get(y, others) for y in range(ctx.classes)])
    return Features(mean, torch.stack(variances).mean().clamp(min=1e-8))


def images_read(labels: np.ndarray) -> int:
    """Return how many images `real_features` forwards by one teacher, for the labels of train."""
    return int(np.minimum(np.bincount(labels), REAL).sum())
