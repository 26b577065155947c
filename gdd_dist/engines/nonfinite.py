"""Losses and gradients that are not finite: their step is skipped and counted; after many in a row the loop goes back once, then ends."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def poisoned(loss: Tensor) -> Tensor:
    """Return scalar ``loss``, whose gradients are NaN if it is not finite; their mean then informs all ranks."""
    return loss * (loss.detach() * 0 + 1)  # times 1, or NaN


@torch.no_grad()
def all_finite(parameters: Iterable[Tensor]) -> Tensor:
    """Whether every gradient is finite: a bool scalar on their device. Reading it waits for the device."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return torch.ones((), dtype=torch.bool)
    # The same as the infinity norm, which is ten times slower on a CPU.
    largest = torch.stack(torch._foreach_max(torch._foreach_abs(gradients)))
    return largest.isfinite().all()


def step_if(finite: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Step ``optimizer`` if ``finite``, a bool scalar, is true. A fused optimizer decides on the device, without a wait."""
    if not optimizer.defaults["fused"]:
        if finite:
            optimizer.step()
        return
    # torch.amp.GradScaler does the same: a fused optimizer then changes neither weights, nor moments, nor its step count.
    optimizer.found_inf, optimizer.grad_scale = (~finite).float(), None  # type: ignore[attr-defined]
    optimizer.step()
