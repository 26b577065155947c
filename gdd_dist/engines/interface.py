"""The engine interface of the steps: backward pass and optimizer step of one network on all ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor, nn


class Engine(Protocol):
    """One network with its optimizer on all ranks. Gradients are means over the ranks and the micro-batches of a step.

    A training step is ``accumulate`` pairs (an argument of the engine) of forward and ``backward``, then one ``step``.
    """

    module: nn.Module

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Compute a forward that ``backward`` will use."""

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of a scalar loss, reduced over ranks."""

    def step(self, lr: float) -> Tensor:
        """Make one optimizer step with this learning rate; clear gradients. Returns a bool scalar, on the device or the CPU, that is false
        on all ranks if the step was skipped because a gradient was not finite."""

    def gathered(self) -> contextlib.AbstractContextManager[Sequence[Tensor]]:
        """Yield all weights in the network's order, complete, for reading inside the context. All ranks enter it."""

    def weights(self) -> dict[str, Tensor]:
        """Return complete weights and buffers on the CPU. All ranks call it."""

    def state_dict(self) -> dict[str, Any]:
        """Return network and optimizer for a checkpoint that any engine on any number of ranks can load; complete on rank 0.

        All ranks call it."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load rank 0's result of any engine's ``state_dict``. All ranks call it."""

    def close(self) -> None:
        """Free objects that keep the process group alive."""
