"""Soft labels: the mean of the teachers' predicted probabilities."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from gdd_dist.data.pixels import forward_size, to_float
from gdd_dist.engines.precision import autocast

BATCH = 256
"""Images per forward; fewer on a CPU."""


@torch.no_grad()
def soft_labels(teachers: Sequence[nn.Module], images: Tensor, temperature: float, precision: str) -> Tensor:
    """Return the mean over teachers of softmax(logits / temperature) of float images [N, C, H, W] in [-1, 1]: float32 [N, K].

    ``precision`` of the teachers' forwards: float32, tf32, bf16 or fp16.
    """
    parts = []
    for part in images.split(forward_size(images.device, BATCH)):
        total = torch.zeros(())
        for teacher in teachers:
            with autocast(part.device, precision):
                logits = teacher(part)
            total = total.to(part.device) + (logits.float() / temperature).softmax(1)
        parts.append(total / len(teachers))
    return torch.cat(parts)


def chosen(teachers: Sequence[nn.Module], draws: Tensor, labels: Tensor, precision: str) -> Tensor:
    """Return for each of N labels the best of M draws: uint8 [M, N, C, H, W], int64 [N] → uint8 [N, C, H, W]."""
    best = best_draw(teachers, draws, labels, precision).to(draws.device)
    return draws[best, torch.arange(draws.shape[1], device=draws.device)]


def best_draw(teachers: Sequence[nn.Module], draws: Iterable[Tensor], labels: Tensor, precision: str) -> Tensor:
    """Return which of the draws, each uint8 [N, C, H, W], has the highest mean teacher probability of each label: int64 [N].

    ``labels``: int64 [N]. One draw is on the device as floats at a time.
    """
    shares = [class_shares(teachers, to_float(images, labels.device), labels, precision) for images in draws]
    return torch.stack(shares).argmax(0)


def class_shares(teachers: Sequence[nn.Module], images: Tensor, labels: Tensor, precision: str) -> Tensor:
    """Return the teachers' mean probability of each image's class: float32 [N], in [0, 1]. ``labels``: int64 [N]."""
    return soft_labels(teachers, images, 1.0, precision).gather(1, labels[:, None])[:, 0]
