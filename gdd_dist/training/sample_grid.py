"""Grids of images, as arrays."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torchvision.utils import make_grid

from gdd_dist.data.images import to_uint8
from gdd_dist.data.noise import normal
from gdd_dist.models.generator import Generator
from gdd_dist.training.context import Context

GRID_CLASSES, GRID_COLUMNS = 10, 10


def grid(images: Tensor, columns: int) -> np.ndarray:
    """Float images [B, C, H, W] in [-1, 1] → a uint8 picture [H', W', 3], row by row; small images are enlarged."""
    return enlarged_grid(to_uint8(images), columns)


def enlarged_grid(images: Tensor, columns: int) -> np.ndarray:
    """uint8 images [B, C, H, W] → a uint8 picture [H', W', 3], row by row; small images are enlarged."""
    scale = max(1, 32 // images.shape[-1])
    enlarged = images.cpu().repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    picture: Tensor = make_grid(enlarged.float() / 255, nrow=columns, padding=1)
    return (picture * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


@torch.no_grad()
def sample_grid(ctx: Context, generator: Generator) -> np.ndarray:
    """A picture of the same latents each time: a row for each of the first classes."""
    classes = min(ctx.classes, GRID_CLASSES)
    labels = torch.arange(classes).repeat_interleave(GRID_COLUMNS)
    z = torch.from_numpy(normal(0, "grid", 0, np.arange(len(labels)), generator.latent))
    return grid(generator(z.to(ctx.device), labels.to(ctx.device)), GRID_COLUMNS)


def forwards(ctx: Context) -> int:
    """Images of ``sample_grid``."""
    return min(ctx.classes, GRID_CLASSES) * GRID_COLUMNS
