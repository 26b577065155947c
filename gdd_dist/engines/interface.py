"""What the steps ask of an engine: it owns the backward and the optimizer step of one network on all ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor, nn


class Engine(Protocol):
    """One network with its optimizer on all ranks. Gradients are means over ranks, and over the micro-batches of a step.

    A step is as many pairs of forward and ``backward`` as the engine was made for (``accumulate``), then ``step``.
    """

    module: nn.Module

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Forward for a backward to come."""

    def backward(self, loss: Tensor) -> None:
        """Gradients of a scalar loss, reduced over ranks."""

    def step(self, lr: float) -> Tensor:
        """One optimizer step at this learning rate; clears gradients. Returns whether it moved, a bool scalar on the device or on the CPU:
        false, on all ranks, when it was skipped since a gradient was not finite."""

    def gathered(self) -> contextlib.AbstractContextManager[Sequence[Tensor]]:
        """All weights in the network's order, whole, to be read inside the context. All ranks enter it."""

    def weights(self) -> dict[str, Tensor]:
        """Whole weights and buffers on the CPU. All ranks call it."""

    def state_dict(self) -> dict[str, Any]:
        """Network and optimizer, for a checkpoint that any engine on any number of ranks can load; whole on rank 0. All ranks call it."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What an engine's ``state_dict`` gave on rank 0. All ranks call it."""

    def close(self) -> None:
        """Free what holds on to the process group."""
