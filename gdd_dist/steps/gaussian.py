"""Step: the trivial generator. A Gaussian per class in shared principal components, fitted in two passes over the shards.

Its number of components and its spread are chosen on val by the same quick students that measure matching, because a
baseline must be as strong as possible.
"""

from __future__ import annotations

from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gdd_dist.config.steps import Inputs
from gdd_dist.evaluation.quick_students import measure_once
from gdd_dist.models.files import GENERATOR, save_network
from gdd_dist.models.gaussian import LinearGenerator
from gdd_dist.runtime.monitor import Monitor
from gdd_dist.storage.json_files import write_json
from gdd_dist.storage.store import CHECKPOINTS
from gdd_dist.training.context import Context
from gdd_dist.training.gaussian_fit import CHOICE, Gaussians, best_of, moments, most_components
from gdd_dist.training.sample_grid import sample_grid


def run(ctx: Context, work: Path, inputs: Inputs) -> dict[str, Any]:
    """Fit, and write generator.safetensors of the best candidate and choice.json into ``work``."""
    fitted, found = fit(ctx), list[dict[str, Any]]()
    monitor = ctx.monitor("gaussian", work, candidates(ctx), unit="candidate")
    for i, (k, spread) in enumerate(product(components(ctx), ctx.config.gaussian.spread)):
        path, build = work / CHECKPOINTS / f"candidate-{k}-{spread}.json", partial(linear, ctx, fitted, k, spread)
        result = measure_once(ctx, path, build, ctx.config.step_seed("gaussian"))
        found.append({"components": k, "spread": spread, **result.as_dict()})
        monitor.scalars(i, result.scalars())
        monitor.advance(i + 1, f"{k} components, spread {spread}")
    best = best_of(found)
    if ctx.world.is_main:
        save(ctx, work, linear(ctx, fitted, best["components"], best["spread"]), found, inputs, monitor)
    monitor.close()
    ctx.world.say(
        f"gaussian: {best['components']} components, spread {best['spread']}: quick students {best['val']:.1f} % on val"
    )
    return {"chosen": best, "candidates": len(found)}


def candidates(ctx: Context) -> int:
    """Return the number of candidates."""
    return len(components(ctx)) * len(ctx.config.gaussian.spread)


def components(ctx: Context) -> list[int]:
    """Return the numbers of components to try: those of the settings, limited by the images, without repetition."""
    pixels = ctx.manifest.channels * ctx.manifest.height**2
    most = most_components(len(ctx.images("train")), ctx.classes, pixels)
    return sorted({min(k, most) for k in ctx.config.gaussian.components})


def fit(ctx: Context) -> Gaussians:
    """Return means and covariances over train; the ranks share the shards and all get the same bits."""
    images, world = ctx.images("train"), ctx.world
    starts = np.concatenate([[0], np.cumsum(images.shards.shard_samples)])

    def read(shard: int) -> tuple[Tensor, Tensor]:
        world.check_stop()
        rows = np.arange(starts[shard], starts[shard + 1])
        return images.read(rows), torch.from_numpy(images.labels[rows])

    def add(tensor: Tensor) -> Tensor:
        assert tensor.is_contiguous()  # ranks add raw memory, in whatever layout
        return world.add(tensor)

    sums = moments(
        read,
        range(world.rank, len(starts) - 1, world.size),
        pixels=int(np.prod(images.shape)),
        classes=ctx.classes,
        components=max(components(ctx)),
        seed=ctx.config.step_seed("gaussian"),
        add=add,
        lead=world.is_main,
    )
    return Gaussians(sums)


def linear(ctx: Context, fitted: Gaussians, k: int, spread: float) -> LinearGenerator:
    """Return a candidate on the CPU."""
    m, dtype = ctx.manifest, ctx.config.gaussian.dtype
    return fitted.generator(k, channels=m.channels, size=m.height, spread=spread, dtype=dtype)


def save(
    ctx: Context, work: Path, net: LinearGenerator, found: list[dict[str, Any]], inputs: Inputs, monitor: Monitor
) -> None:
    """Write the chosen generator as one self-contained file, and the list of candidates."""
    save_network(work / GENERATOR, net, ctx.generator_meta(net, inputs.provenance))
    write_json(work / CHOICE, {"format": "gdd-gaussian/1", "candidates": found})
    monitor.picture("samples", sample_grid(ctx, ctx.watch(net).eval()), 0)
