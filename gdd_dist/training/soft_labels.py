"""Soft labels: the mean of the teachers' predicted probabilities."""

from __future__ import annotations

from collections.abc import Sequence

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
    """Choose one of M draws for each of N labels: uint8 [M, N, C, H, W], int64 [N] → uint8 [N, C, H, W].

    It is the image with the highest mean teacher probability of its class.
    """
    m, n = draws.shape[:2]
    shares = class_shares(teachers, to_float(draws.flatten(0, 1), labels.device), labels.repeat(m), precision)
    best = shares.view(m, n).argmax(0).to(draws.device)
    return draws[best, torch.arange(n, device=draws.device)]


def class_shares(teachers: Sequence[nn.Module], images: Tensor, labels: Tensor, precision: str) -> Tensor:
    """Return the teachers' mean probability of each image's class: float32 [N], in [0, 1]. ``labels``: int64 [N]."""
    return soft_labels(teachers, images, 1.0, precision).gather(1, labels[:, None])[:, 0]
