"""How many images go through a network at once where nothing is trained. Imports little: whoever only draws images needs it too."""

from __future__ import annotations

import torch

CPU_BATCH = 32
"""Images a forward on a CPU: a layer's activations stay in its cache."""


def forward_size(device: torch.device, batch: int) -> int:
    """Images a forward, ``batch`` at most."""
    return min(CPU_BATCH, batch) if device.type == "cpu" else batch
