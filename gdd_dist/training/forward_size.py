"""How many images a network forwards at once without training. Imports little, because programs that only draw need it, too."""

from __future__ import annotations

import torch

CPU_BATCH = 32
"""Images per forward on a CPU, so few that a layer's activations stay in the cache."""


def forward_size(device: torch.device, batch: int) -> int:
    """Return the number of images per forward, at most ``batch``."""
    return min(CPU_BATCH, batch) if device.type == "cpu" else batch
