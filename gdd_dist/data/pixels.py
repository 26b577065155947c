"""Converts between 8-bit pixels and the floats of networks. Needs only torch, so that programs which only draw load little."""

from __future__ import annotations

import torch
from torch import Tensor


def to_float(images: Tensor, device: torch.device) -> Tensor:
    """uint8 [B, C, H, W] → float32 in [-1, 1] on ``device``."""
    return images.to(device, non_blocking=True).contiguous().float().mul_(1 / 127.5).sub_(1)


def to_uint8(images: Tensor) -> Tensor:
    """Float in [-1, 1] → uint8, rounded."""
    return images.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
