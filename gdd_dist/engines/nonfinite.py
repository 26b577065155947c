"""Losses and gradients that are not finite: the step is skipped and counted; many in a row, and the loop goes back once, then ends."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def poisoned(loss: Tensor) -> Tensor:
    """``loss``, a scalar, with gradients of NaN where it is not finite itself: their mean then says so to all ranks."""
    return loss * (loss.detach() * 0 + 1)  # times 1, or NaN


@torch.no_grad()
def all_finite(parameters: Iterable[Tensor]) -> bool:
    """Whether every gradient is; waits for the device."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return True
    # The same as their infinity norm, which takes a CPU ten times as long.
    largest = torch.stack(torch._foreach_max(torch._foreach_abs(gradients)))
    return bool(largest.isfinite().all())
