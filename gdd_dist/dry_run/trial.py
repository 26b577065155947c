"""Runs a step's own code on made-up inputs and a few real images, measured by a Meter. All ranks must call it in the same order.

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
from gdd_dist.training.classifier_fit import student_step
from gdd_dist.training.context import Context
from gdd_dist.training.drawing import draw
from gdd_dist.training.loop import Trainee

SILENT = Monitor(None, "dry-run", 1, active=False)
Work = Callable[[Tensor, Tensor], object]
"""The work to measure, given augmented images, float [n, C, H, W], and their labels, int64 [n]."""


class Estimate(NamedTuple):
    """What is left of a step. ``resumes``: a part is done; ``steps``: optimizer steps; ``images``: images forwarded; ``cost``: in total."""

    resumes: bool
    steps: int
    images: int
    cost: Cost


class Training(NamedTuple):
    """One step of a trainee. ``forwards``: of its full batch, on all its ranks; ``settling``: forwards before the first step."""

    cost: Cost = NOTHING
    forwards: int = 0
    settling: int = 0


class Trial:
    """What the estimates of all steps share. ``directories``: with each step's made-up files; ``shards``: samples of each train shard;
    ``pool``: for each teacher, whether it is the last snapshot of its training, and its architecture.
    """

    def __init__(self, ctx: Context, meter: Meter, fps: Mapping[str, str], scratch: Path) -> None:
        self.ctx, self.meter, self.fps, t = ctx, meter, fps, ctx.config.teachers
        self.directories = {name: scratch / name for name in TABLE}
        self.shards = ctx.images("train").shards.shard_samples
        self.pool = list(product([True] + [False] * (t.snapshots - 1), t.architectures * t.seeds))
        self._known: dict[Any, Cost] = {}

    @property
    def inputs(self) -> Inputs:
        """Return the made-up files as a step's inputs."""
        return Inputs(self.directories, self.fps, {})

    def training(
        self,
        section: str,
        ranks: int,
        build: Callable[[Context], Trainee],
        unit: int,
        arrange: Callable[[Any], Any] = lambda batch: batch,
    ) -> Training:
        """Measure one training step of the trainee that ``build`` makes, trained by ``ranks`` ranks together.

        If some ranks would wait, the others have larger shares of the batch; here all ranks try such a share. Smaller batches are
        multiples of ``unit`` on each rank. ``arrange`` changes the batch that was read before the training step.
        """
        batch, counted = int(getattr(self.ctx.config, section).batch), (1, 0, 0)
        working = taking_part(self.ctx.config, section, ranks)

        def prepare(n: int) -> Callable[[], object]:
            opened.close()
            gc.collect()  # frees the memory of the previous trainee before measuring
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
        """Return the total seconds for ``images`` in batches, and the peak memory of one batch; equal work is measured once."""
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
    """Return a copy of the context whose ``section`` has this global batch, and whose count of forwards is 0."""
    own = replace(getattr(ctx.config, section), batch=batch)
    loader = replace(ctx.config.loader, streams=ranks)  # this number divides any batch here
    return replace(ctx, config=replace(ctx.config, loader=loader, **{section: own}), forwards=0)


def answering(trial: Trial, name: str) -> Work:
    """A classifier's forward: the work of caching logits, and of measuring on a split except for the augmentation."""
    ctx, net = trial.ctx, trial.ctx.classifier(name, 0, "dry-run").eval()

    def work(images: Tensor, _: Tensor) -> object:
        with torch.no_grad(), autocast(ctx.device, ctx.precision):
            return net(images).float().cpu()

    return work


def studying(trial: Trial, name: str) -> Work:
    """A training step of a student."""
    return student_step(trial.ctx, trial.ctx.classifier(name, 0, "dry-run"), trial.ctx.config.report.lr)


def labelling(trial: Trial) -> Work:
    """Soft labels."""
    frozen = Frozen(trial.ctx, trial.directories)
    assert frozen.teachers  # reading them loads the networks
    return lambda images, _: frozen.soft_labels(images, trial.ctx.config.report.label_temperature)


def condensing(trial: Trial) -> Work:
    """Return the work of moving latents, but for the generator's part: a teacher's forward, and the gradient of its images."""
    teacher = Frozen(trial.ctx, trial.directories).teachers[0]

    def work(images: Tensor, labels: Tensor) -> object:
        with autocast(images.device, trial.ctx.precision):
            logits = teacher(images.requires_grad_())
        return torch.autograd.grad(logits.float().logsumexp(1).sum(), images)

    return work


def drawing(trial: Trial, train_on: str) -> Work:
    """Drawing from the generator of the rows ``train_on``; those of gan and matching cost the same."""
    ctx, net = trial.ctx, Frozen(trial.ctx, trial.directories).generator(train_on)
    return lambda _, labels: draw(ctx, net, labels.cpu().numpy(), 0, "dry-run", 0, batch=len(labels))


def steps_done(ctx: Context, directory: Path) -> int:
    """Return the step from which a loop would continue."""
    found = ctx.checkpoints(directory).load()
    return 0 if found is None else found[0]
