"""Draws images from a generator as a user gets them: rounded to 8 bits, a function of (seed, purpose, step, slot)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from gdd_dist.data.images import to_uint8
from gdd_dist.data.noise import normal
from gdd_dist.data.pixels import CPU_DRAWS, forward_size
from gdd_dist.models.generator import ImageGenerator
from gdd_dist.training.context import Context

DRAW_BATCH = 500


@torch.no_grad()
def draw(
    ctx: Context,
    generator: ImageGenerator,
    labels: np.ndarray,
    seed: int,
    purpose: str,
    step: int,
    batch: int = DRAW_BATCH,
    slots: np.ndarray | None = None,
) -> Tensor:
    """Return uint8 images [n, C, H, W] on the device for labels int64 [n]; image i has slot i, or ``slots[i]``."""
    parts = []
    slots = np.arange(len(labels)) if slots is None else slots
    batch = forward_size(ctx.device, batch, CPU_DRAWS)
    for i in range(0, len(labels), batch):
        y = labels[i : i + batch]
        z = normal(seed, f"{purpose}/z", step, slots[i : i + len(y)], generator.latent)
        # Always in float32, because `load_generator` draws so, too.
        parts.append(to_uint8(generator(*ctx.sent((torch.from_numpy(z), torch.from_numpy(y))))))
    return torch.cat(parts)
