"""Arranges images in grids, as arrays."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gdd_dist.data.images import to_uint8
from gdd_dist.data.noise import normal
from gdd_dist.models.generator import ImageGenerator
from gdd_dist.training.context import Context

GRID_CLASSES, GRID_COLUMNS = 10, 10


def grid(images: Tensor, columns: int) -> np.ndarray:
    """Arrange float images [B, C, H, W] in [-1, 1] in a uint8 picture [H', W', 3], row by row; enlarges small images."""
    return enlarged_grid(to_uint8(images), columns)


def enlarged_grid(images: Tensor, columns: int) -> np.ndarray:
    """Arrange uint8 images [B, C, H, W] in a uint8 picture [H', W', 3], row by row; enlarges small images."""
    scale = max(1, 32 // images.shape[-1])
    enlarged = images.cpu().repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    return laid_out(enlarged.numpy(), columns)


def laid_out(images: np.ndarray, columns: int) -> np.ndarray:
    """Arrange uint8 images [B, C, H, W], C 1 or 3, in a uint8 picture [H', W', 3], row by row, with a black line around each.

    A single image has no lines.
    """
    count, channels, height, width = images.shape
    if count == 1:
        return images[0].repeat(3 // channels, 0).transpose(1, 2, 0)
    columns = min(columns, count)
    picture = np.zeros((-(-count // columns) * (height + 1) + 1, columns * (width + 1) + 1, 3), np.uint8)
    for i, image in enumerate(images):
        y, x = i // columns * (height + 1) + 1, i % columns * (width + 1) + 1
        picture[y : y + height, x : x + width] = image.transpose(1, 2, 0)  # broadcasts one channel to three
    return picture


def as_png(picture: np.ndarray) -> bytes:
    """Return a uint8 picture [H, W, 3] as PNG bytes."""
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "PNG")
    return stream.getvalue()


@torch.no_grad()
def sample_grid(ctx: Context, generator: ImageGenerator) -> np.ndarray:
    """Return a picture with a row for each of the first classes; it always uses the same latents."""
    classes = min(ctx.classes, GRID_CLASSES)
    labels = torch.arange(classes).repeat_interleave(GRID_COLUMNS)
    z = torch.from_numpy(normal(0, "grid", 0, np.arange(len(labels)), generator.latent))
    return grid(generator(z.to(ctx.device), labels.to(ctx.device)), GRID_COLUMNS)


def forwards(ctx: Context) -> int:
    """Return the number of images in ``sample_grid``."""
    return min(ctx.classes, GRID_CLASSES) * GRID_COLUMNS
