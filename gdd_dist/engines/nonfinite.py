"""Losses and gradients that are not finite: the step is skipped and counted; many in a row, and the loop goes back once, then ends."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def poisoned(loss: Tensor) -> Tensor:
    """``loss``, a scalar, with gradients of NaN where it is not finite itself: their mean then says so to all ranks."""
    return loss * (loss.detach() * 0 + 1)  # times 1, or NaN


@torch.no_grad()
def all_finite(parameters: Iterable[Tensor]) -> Tensor:
    """Whether every gradient is: a bool scalar on their device. Who reads it waits for the device."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return torch.ones((), dtype=torch.bool)
    # The same as their infinity norm, which takes a CPU ten times as long.
    largest = torch.stack(torch._foreach_max(torch._foreach_abs(gradients)))
    return largest.isfinite().all()


def step_if(finite: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """A step of ``optimizer`` where ``finite``, a bool scalar, says so. A fused one decides on the device, and nobody waits."""
    if not optimizer.defaults["fused"]:
        if finite:
            optimizer.step()
        return
    # How torch.amp.GradScaler tells a fused optimizer: it then moves neither weights, nor moments, nor its count of steps.
    optimizer.found_inf, optimizer.grad_scale = (~finite).float(), None  # type: ignore[attr-defined]
    optimizer.step()
