"""What benchmarks run on where they are given nothing: images, and finished steps as the dry run makes them up."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from gdd_dist.config import command_line
from gdd_dist.config.steps import TABLE, fingerprints
from gdd_dist.dry_run.estimates import ESTIMATES
from gdd_dist.dry_run.trial import SILENT, Trial
from gdd_dist.runtime.meter import Meter
from gdd_dist.runtime.world import World
from gdd_dist.steps.matching import Matching
from gdd_dist.steps.matching_pool import Pool
from gdd_dist.storage.store import Store
from gdd_dist.training.context import Context
from sharding.manifest import Manifest
from sharding.options import Options
from sharding.writer import build

FINISHED = ("teachers", "logits", "gaussian", "gan")
"""What matching reads."""


def jpegs(folder: Path, images: int, size: int = 64) -> Path:
    """A data set of JPEGs of ten classes with the texture, and so the size, of photographs that small (about 2 KB at 64 pixels)."""
    rng = np.random.default_rng(0)
    for i in range(images + images // 2):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).resize(
            (size, size), Image.Resampling.BICUBIC
        )
        pixels = np.asarray(coarse) + rng.normal(0, 8, (size, size, 3))
        path = folder / "images" / f"class-{i % 10}" / f"{i:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=85)
    options = Options(test_fraction=0.1, shard_size=images * 1000, workers=1)
    build(f"folder:{folder / 'images'}", folder / "data", options)
    return folder / "data"


def before_matching(folder: Path, data: Path, settings: Sequence[str]) -> Trial:
    """The steps before matching as finished ones in ``folder``, a new directory: random networks, logits of zero.

    One process of one thread, on the CPU, in float32. ``settings`` are those of gdd_dist.train.
    """
    own = ["--data", str(data), "--out", str(folder), "--device", "cpu", "--loader.threads", "1"]
    config, manifest = command_line.parse([*settings, *own]).config, Manifest.load(data)
    world = World("cpu")
    torch.set_num_threads(1)
    ctx = Context(config, world, data, manifest, Store(folder), folder, "float32", keeps=False)
    trial = Trial(ctx, Meter(world), fingerprints(config, manifest, "float32"), folder)
    for step in TABLE:
        trial.directories[step].mkdir(parents=True)
        if step in FINISHED:
            ESTIMATES[step][0](trial, trial.directories[step])
    return trial


def matching_step(trial: Trial, pool: Pool) -> Callable[[], None]:
    """A step of the trainer's own, with what its loop reads ahead; each call takes the next one."""
    trainee = Matching(trial.ctx, trial.directories["matching"], pool, trial.inputs)
    trainee.monitor = SILENT
    numbers = itertools.count(1)

    def step() -> None:
        number = next(numbers)
        trainee.train(number, trainee.read(number))

    return step
