"""Trains and measures a classifier on one rank; shared by teachers, quick students and the report's students."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gdd_dist.data.images import Images, to_float
from gdd_dist.data.pixels import forward_size
from gdd_dist.engines.captured import Step
from gdd_dist.engines.nonfinite import all_finite, poisoned, step_if
from gdd_dist.engines.precision import autocast
from gdd_dist.training.context import Context
from gdd_dist.training.optimizers import SGD

PREDICT_BATCH = 500


def sgd(net: nn.Module, lr: float, momentum: float, weight_decay: float, nesterov: bool = False) -> torch.optim.SGD:
    """SGD over all weights, each read and written once a step (fused)."""
    nesterov = nesterov and momentum > 0
    weights = list(net.parameters())
    optimizer = SGD(weights, lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov, fused=True)
    # torch would make the buffers at the first step, of whatever lies in memory, and leave them so where that step is skipped.
    if momentum:
        optimizer.state.update({w: {"momentum_buffer": torch.zeros_like(w)} for w in weights})
    return optimizer


def train_step(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    targets: Tensor,
    lr: float,
    precision: str,
) -> Tensor:
    """One step of cross-entropy on float images [B, C, H, W]; targets int64 [B], or probabilities [B, K].

    A step whose loss or gradient is not finite moves nothing. Returns whether it moved, a bool scalar, for `Skips`; waits for nothing.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    with autocast(images.device, precision):
        logits = net(images)
    loss = F.cross_entropy(logits.float(), targets)
    optimizer.zero_grad(set_to_none=True)
    poisoned(loss).backward()
    moved = all_finite(net.parameters())
    step_if(moved, optimizer)
    return moved


def student_step(ctx: Context, net: nn.Module, lr: float) -> Step:
    """Return the step of a student, by the optimizer that ``report`` describes: float images [B, C, H, W], targets → whether it moved."""
    r = ctx.config.report
    optimizer = sgd(net, lr, r.momentum, r.weight_decay)
    return ctx.captured(partial(train_step, net, optimizer, lr=lr, precision=ctx.precision))


@torch.no_grad()
def predict(
    net: nn.Module,
    read: Callable[[np.ndarray], Tensor],
    n: int,
    device: torch.device,
    precision: str,
    batch: int = PREDICT_BATCH,
) -> Tensor:
    """Float32 logits [n, K] on the CPU of images 0 … n - 1; ``read(indices)`` gives uint8 [B, C, H, W]."""
    net.eval()
    parts = []
    for i in range(0, n, batch):
        with autocast(device, precision):
            images = to_float(read(np.arange(i, min(i + batch, n))), device)
            parts += [net(part).float().cpu() for part in images.split(forward_size(device, batch))]
    net.train()
    return torch.cat(parts)


def accuracy(net: nn.Module, images: Images, device: torch.device, precision: str) -> float:
    """Return the percentage of a split that ``net`` classifies correctly."""
    logits = predict(net, images.read, len(images), device, precision)
    return 100.0 * float((logits.argmax(1).numpy() == images.labels).mean())
