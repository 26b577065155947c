"""Differentiable augmentation of a whole batch, as a pure function of uniform draws, so that any view can be replayed.

The operations and their strengths are those of DSA (Zhao & Bilen 2021), which DiM and DiffAugment share, carried over
from normalised pixels to [-1, 1]. Geometry is one gather and one mask, so that a call costs a handful of kernels. A pixel is seen
in one place at most: its gradient there is no sum, so that on a GPU, too, the order of adding changes no bit of it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

AUGMENT_DRAWS = 8
"""Uniform numbers a sample uses: brightness, saturation, contrast, shift y, shift x, box y, box x, flip."""

OPS = ("color", "crop", "cutout")

_BRIGHTNESS = 0.25  # DSA: +-0.5 of normalised pixels, whose std is about 0.25 of [0, 1], so 0.5 of [-1, 1]
_SHIFT = 0.125  # of the side
_BOX = 0.5  # of the side


def augment(
    images: Tensor,
    draws: Tensor,
    *,
    flip: bool,
    fill: float | Sequence[float] | Tensor,
    ops: str = "color_crop_cutout",
) -> Tensor:
    """Augment images [B, C, H, W] float in [-1, 1] with draws [B, AUGMENT_DRAWS] float32 in [0, 1).

    Differentiable with respect to the images; each sample depends on its own row of draws alone. `ops` names the
    operations ("color", "crop", "cutout", joined by "_"; "" or "none" for none), `flip` adds mirroring with probability
    one half. What a shift uncovers and what the box hides take the value `fill`, a scalar or one value per channel: the
    data set's mean is what DSA does (zero after normalisation), and on digits students learnt more with it than with the
    background's black. Raises ValueError for an unknown operation or draws of another shape.
    """
    names = set(ops.split("_")) - {"", "none"}
    if unknown := names - set(OPS):
        raise ValueError(f"unknown augmentation {sorted(unknown)}; known: {', '.join(OPS)}")
    if draws.shape != (len(images), AUGMENT_DRAWS):
        raise ValueError(f"draws are {tuple(draws.shape)}, expected {(len(images), AUGMENT_DRAWS)}")
    if "color" in names:
        images = _color(images, draws)
    if not flip and not names & {"crop", "cutout"}:
        return images
    return _geometry(images, draws, flip=flip, crop="crop" in names, cutout="cutout" in names, fill=fill)


def _color(images: Tensor, draws: Tensor) -> Tensor:
    brightness, saturation, contrast = draws[:, :3].to(images.dtype).view(-1, 3, 1, 1, 1).unbind(1)
    images = images + (brightness - 0.5) * (2 * _BRIGHTNESS)
    if images.shape[1] == 3:
        grey = images.mean(1, keepdim=True)
        images = grey + (images - grey) * (2 * saturation)
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + (images - mean) * (contrast + 0.5)


def _geometry(
    images: Tensor, draws: Tensor, *, flip: bool, crop: bool, cutout: bool, fill: float | Sequence[float] | Tensor
) -> Tensor:
    batch, channels, height, width = images.shape
    rows = torch.arange(height, device=images.device).expand(batch, height)
    columns = torch.arange(width, device=images.device).expand(batch, width)
    visible: Tensor | None = None
    if cutout:
        hidden_rows = _inside_box(rows, draws[:, 5], height)
        hidden_columns = _inside_box(columns, draws[:, 6], width)
        visible = ~(hidden_rows[:, :, None] & hidden_columns[:, None, :])
    if crop:
        rows, columns = rows + _shift(draws[:, 3], height), columns + _shift(draws[:, 4], width)
        covered = _within(rows, height)[:, :, None] & _within(columns, width)[:, None, :]
        visible = covered if visible is None else visible & covered
        rows, columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
    if flip:
        columns = torch.where(draws[:, 7:8] < 0.5, columns, width - 1 - columns)
    if crop or flip:
        index = (rows[:, :, None] * width + columns[:, None, :]).view(batch, 1, -1)
        images = images.flatten(2).gather(2, index.expand(batch, channels, -1)).view(images.shape)
    if visible is None:
        return images
    background = torch.as_tensor(fill, dtype=images.dtype, device=images.device).view(1, -1, 1, 1)
    return torch.where(visible[:, None], images, background)


def _shift(draw: Tensor, side: int) -> Tensor:
    """A whole number of pixels in [-side/8, side/8], [B, 1]."""
    reach = int(side * _SHIFT + 0.5)
    return (draw * (2 * reach + 1)).long().clamp(max=2 * reach)[:, None] - reach


def _within(index: Tensor, side: int) -> Tensor:
    return (index >= 0) & (index < side)


def _inside_box(index: Tensor, draw: Tensor, side: int) -> Tensor:
    """Which of the indices [B, side] lie in a box of half the side whose centre is uniform over the image."""
    box = int(side * _BOX + 0.5)
    first = (draw * (side + 1 - box % 2)).long()[:, None] - box // 2
    return (index >= first) & (index < first + box)
