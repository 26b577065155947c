"""Matching without gradients: the Gaussian of each class is refitted to draws that the teachers choose.

Of n draws, the one with the highest mean teacher probability of its class is chosen. The new Gaussian has the mean of the chosen
draws. Its covariance is the average of theirs and the old one, because chosen draws alone have too little variance for training.
Shapes: n draws for each of M chosen images, C classes, K latent, D pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from gdd_dist.data.images import to_float, to_uint8
from gdd_dist.data.noise import normal
from gdd_dist.models.gaussian import LinearGenerator, pack
from gdd_dist.training.context import Context
from gdd_dist.training.drawing import DRAW_BATCH
from gdd_dist.training.gaussian_fit import one_thread
from gdd_dist.training.soft_labels import class_shares

PLACES = 8
"""Chosen draws per latent dimension, so many that the covariance of K dimensions is reliable."""
KEPT = 0.5
"""Weight of the old covariance."""


def refit(ctx: Context, net: LinearGenerator, teachers: Sequence[nn.Module], of: int) -> LinearGenerator:
    """Return a generator like ``net``, refitted to the best of ``of`` draws, on the device. Ranks share the classes; all call it."""
    world, net = ctx.world, net.to(ctx.device)
    means, roots = torch.zeros_like(net.class_means), torch.zeros_like(net.roots, dtype=torch.float32)
    for y in range(world.rank, ctx.classes, world.size):
        means[y], roots[y] = refitted_class(ctx, net, teachers, of, y)
    world.add(means)
    world.add(roots)
    return net.with_classes(means, roots)


@torch.no_grad()
def refitted_class(
    ctx: Context, net: LinearGenerator, teachers: Sequence[nn.Module], of: int, y: int
) -> tuple[Tensor, Tensor]:
    """Return a class's new mean [K], and the packed root [K(K+1)/2] of its new covariance, on the CPU."""
    k, seed = net.latent, ctx.config.step_seed("matching")
    total, step = places(net), max(1, DRAW_BATCH // of)
    chosen = []
    for first in range(0, total, step):
        ctx.world.check_stop()
        slots = np.arange(first * of, min(first + step, total) * of)
        z = torch.from_numpy(normal(seed, f"matching/refit/{y}", 0, slots, k)).to(ctx.device)
        labels = torch.full((len(z),), y, device=ctx.device)
        images = to_float(to_uint8(net(z, labels)), ctx.device)  # rounded to 8 bits, as for a student
        best = class_shares(teachers, images, labels, ctx.precision).view(-1, of).argmax(1)
        chosen.append(z.view(-1, of, k)[torch.arange(len(best)), best].cpu())
    return moved(net, y, torch.cat(chosen).double())


@one_thread()
def moved(net: LinearGenerator, y: int, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean [K] and packed root [K(K+1)/2] of class ``y``, refitted to its ``chosen`` latents, float64 [M, K]."""
    root = net.root(y)
    codes = chosen @ root.T
    covariance = (1 - KEPT) * codes.T.cov() + KEPT * root @ root.T
    mean = net.class_means[y].cpu() + codes.mean(0)
    return mean, pack(torch.linalg.cholesky(covariance), net.places.cpu())


def places(net: LinearGenerator) -> int:
    """Return M, the number of chosen draws per class."""
    return PLACES * net.latent


def draws(net: LinearGenerator, of: int) -> int:
    """Return how many images are drawn for a refit; every teacher forwards each of them."""
    return of * places(net) * net.classes
