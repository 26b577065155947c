"""A trial of a step: its own code on made-up inputs and a few real images, measured by a Meter. All ranks call it alike.

Nothing is read from finished steps.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gdd_dist.config.ranks import taking_part
from gdd_dist.config.steps import TABLE, Inputs
from gdd_dist.data.augment import AUGMENT_DRAWS
from gdd_dist.data.images import to_float
from gdd_dist.data.noise import uniform
from gdd_dist.engines.precision import autocast
from gdd_dist.evaluation.students import Frozen
from gdd_dist.runtime.meter import NOTHING, Cost, Meter
from gdd_dist.runtime.monitor import Monitor
from gdd_dist.training.classifier_fit import sgd, train_step
from gdd_dist.training.context import Context
from gdd_dist.training.drawing import draw
from gdd_dist.training.loop import Trainee

SILENT = Monitor(None, "dry-run", 1, active=False)
Work = Callable[[Tensor, Tensor], object]
"""What is done with augmented images, float [n, C, H, W], and their labels, int64 [n]."""


class Training(NamedTuple):
    """One step of a trainee. ``forwards``: of its whole batch, on all its ranks; ``settling``: those before the first step."""

    cost: Cost = NOTHING
    forwards: int = 0
    settling: int = 0


class Trial:
    """What the estimates of all steps share. ``directories``: of each step's made-up files; ``shards``: samples of each of train's;
    ``pool``: of each teacher whether it is its training's last snapshot, and its architecture.
    """

    def __init__(self, ctx: Context, meter: Meter, fps: Mapping[str, str], scratch: Path) -> None:
        self.ctx, self.meter, self.fps, t = ctx, meter, fps, ctx.config.teachers
        self.directories = {name: scratch / name for name in TABLE}
        self.shards = ctx.images("train").shards.shard_samples
        self.pool = list(product([True] + [False] * (t.snapshots - 1), t.architectures * t.seeds))
        self._known: dict[Any, Cost] = {}

    @property
    def inputs(self) -> Inputs:
        """The made-up files as a step's inputs."""
        return Inputs(self.directories, self.fps, {})

    def training(
        self,
        section: str,
        ranks: int,
        build: Callable[[Context], Trainee],
        unit: int,
        arrange: Callable[[Any], Any] = lambda batch: batch,
    ) -> Training:
        """A step of the trainee that ``build`` makes, which ``ranks`` train together.

        Where some of them would wait, those that work have larger shares; here all try such a share. Batches smaller than the whole are
        multiples of ``unit`` on each. ``arrange``: changes what was read before it is trained on.
        """
        batch, counted = int(getattr(self.ctx.config, section).batch), (1, 0, 0)
        working = taking_part(self.ctx.config, section, ranks)

        def prepare(n: int) -> Callable[[], object]:
            opened.close()
            gc.collect()  # the memory of the trainee before is not this one's
            ctx = smaller(self.ctx, section, n * ranks, ranks)
            trainee = build(ctx)
            opened.callback(trainee.close)
            trainee.monitor, settling = SILENT, ctx.forwards
            read = arrange(trainee.read(0))

            def step() -> None:
                nonlocal counted
                before = ctx.forwards
                trainee.train(0, read)
                counted = n, ctx.forwards - before, settling

            return step

        with ExitStack() as opened:
            cost = self.meter(prepare, batch // working, unit).at(batch // working)
        n, forwards, settling = counted
        return Training(cost, forwards * batch // n, settling * working)

    def cost(self, images: int, batch: int, make: Callable[..., Work], *names: str) -> Cost:
        """All the seconds that work on ``images`` in batches takes, and the peak of one: measured once, for many times."""
        if not images:
            return NOTHING
        ctx, train, batch = self.ctx, self.ctx.images("train"), min(batch, images)
        if (make, names, batch) not in self._known:
            work = make(self, *names)

            def prepare(n: int) -> Callable[[], object]:
                rows, draws = np.arange(n) % len(train), uniform(0, "dry-run", 0, np.arange(n), AUGMENT_DRAWS)
                pixels, labels = train.read(rows), torch.from_numpy(train.labels[rows]).to(ctx.device)
                return lambda: work(ctx.augment(to_float(pixels, ctx.device), torch.from_numpy(draws)), labels)

            self._known[make, names, batch] = self.meter(prepare, batch).at(batch)
        one = self._known[make, names, batch]
        return replace(one, seconds=one.seconds * images / batch)


def smaller(ctx: Context, section: str, batch: int, ranks: int) -> Context:
    """A context of its own whose ``section`` has this global batch, its count of forwards at 0."""
    own = replace(getattr(ctx.config, section), batch=batch)
    loader = replace(ctx.config.loader, streams=ranks)  # which divide any batch
    return replace(ctx, config=replace(ctx.config, loader=loader, **{section: own}), forwards=0)


def answering(trial: Trial, name: str) -> Work:
    """A classifier's answer: what caching logits takes, and measuring on a split, all but the augmentation."""
    ctx, net = trial.ctx, trial.ctx.classifier(name, 0, "dry-run").eval()

    def work(images: Tensor, _: Tensor) -> object:
        with torch.no_grad(), autocast(ctx.device, ctx.precision):
            return net(images).float().cpu()

    return work


def studying(trial: Trial, name: str) -> Work:
    """A training step of a student."""
    r, net = trial.ctx.config.report, trial.ctx.classifier(name, 0, "dry-run")
    optimizer = sgd(net, r.lr, r.momentum, r.weight_decay)
    return lambda images, labels: train_step(net, optimizer, images, labels, r.lr, trial.ctx.precision)


def labelling(trial: Trial) -> Work:
    """Soft labels."""
    frozen = Frozen(trial.ctx, trial.directories)
    assert frozen.teachers  # now they are loaded
    return lambda images, _: frozen.soft_labels(images, trial.ctx.config.report.label_temperature)


def drawing(trial: Trial, train_on: str) -> Work:
    """Drawing from the generator of these rows; gan's and matching's are alike."""
    ctx, net = trial.ctx, Frozen(trial.ctx, trial.directories).generator(train_on)
    return lambda _, labels: draw(ctx, net, labels.cpu().numpy(), 0, "dry-run", 0, batch=len(labels))
