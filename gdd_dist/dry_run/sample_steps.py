"""Each step's true training step as the dry run calls it: random weights, the first training images, any batch.

Every function gives a Prepare: batch → a step of that many images of this rank, to be called several times.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from gdd_dist.data.augment import AUGMENT_DRAWS
from gdd_dist.data.images import to_float
from gdd_dist.data.noise import normal, uniform
from gdd_dist.dry_run.meter import Prepare
from gdd_dist.engines.precision import autocast
from gdd_dist.evaluation.students import Frozen
from gdd_dist.models.generator import Generator
from gdd_dist.steps import gan, matching, teachers
from gdd_dist.training.adversaries import Adversaries
from gdd_dist.training.classifier_fit import sgd, train_step
from gdd_dist.training.context import Context
from gdd_dist.training.drawing import draw
from gdd_dist.training.skipped_steps import Skips


def adversaries(ctx: Context) -> Adversaries:
    """The GAN's networks before the first step."""
    g = ctx.config.gan
    return Adversaries(ctx, *gan.networks(ctx), (g.beta1, g.beta2))


def some_images(ctx: Context, n: int) -> tuple[Tensor, Tensor]:
    """The first ``n`` training images (again from the start where there are fewer), uint8 [n, C, H, W], and labels."""
    images = ctx.images("train")
    indices = np.arange(n) % len(images)
    return images.read(indices), torch.from_numpy(images.labels[indices]).to(ctx.device)


def some_draws(n: int) -> Tensor:
    """Augmentation draws of ``n`` images."""
    return torch.from_numpy(uniform(0, "dry-run", 0, np.arange(n), AUGMENT_DRAWS))


def gan_step(ctx: Context, nets: Adversaries) -> Prepare:
    """A step of the gan."""

    def prepare(n: int) -> Callable[[], object]:
        batch, labels = some_images(ctx, n)
        slots = np.arange(n) + ctx.world.rank * n

        def step() -> object:
            return gan.gan_step(ctx, nets, 0, slots, batch, labels)

        return step

    return prepare


def matching_step(ctx: Context, nets: Adversaries, matcher: matching.Pool) -> Prepare:
    """A step of matching. Groups take the teachers in turn, architectures first; in less than the whole batch they are small."""
    m, t, world = ctx.config.matching, ctx.config.teachers, ctx.world
    images, views = ctx.images("train"), min(m.views or matcher.cache.views, matcher.cache.views)
    by_training = np.arange(t.seeds * len(t.architectures)) * t.snapshots
    teachers = (by_training + np.arange(t.snapshots)[::-1, None]).ravel()
    if m.teachers == "last":
        teachers = teachers[: len(by_training)]

    def prepare(n: int) -> Callable[[], object]:
        group = m.group if n * world.size == m.batch else small_group(m.group)
        config = dataclasses.replace(ctx.config, matching=dataclasses.replace(m, batch=n * world.size, group=group))
        groups = matching.Dealer(config, images.labels, teachers, views).batch(0, world.rank, world.size)
        turns = np.arange(len(groups.classes)) % len(teachers)
        groups = dataclasses.replace(groups, teachers=teachers[turns])
        real = images.read(groups.samples) if m.lambda_adv else None
        whole = matching.Batch(groups, matcher.real_logits(groups), real)
        return lambda: matching.matching_step(ctx, nets, matcher, 0, whole)

    return prepare


def small_group(group: int) -> int:
    """Slots of a group in a batch that only serves to be continued from."""
    return min(2, group)


@contextmanager
def teaching(ctx: Context, name: str) -> Iterator[Prepare]:
    """A training step of a teacher, on all teams at once."""
    t, net = ctx.config.teachers, ctx.classifier(name, 0, "dry-run")
    engine = teachers.team_engine(ctx, net, sgd(net, t.lr, t.momentum, t.weight_decay, nesterov=True))

    def prepare(n: int) -> Callable[[], object]:
        (batch, labels), draws = some_images(ctx, n), some_draws(n)

        def step() -> object:
            x = ctx.augment(to_float(batch, ctx.device), draws)
            return teachers.teacher_step(engine, x, labels, t.lr, Skips())

        return step

    yield prepare
    engine.close()


def training(ctx: Context, name: str) -> Prepare:
    """A training step of a student."""
    r, net = ctx.config.report, ctx.classifier(name, 0, "dry-run")
    optimizer = sgd(net, r.lr, r.momentum, r.weight_decay)

    def prepare(n: int) -> Callable[[], object]:
        (batch, labels), draws = some_images(ctx, n), some_draws(n)

        def step() -> None:
            x = ctx.augment(to_float(batch, ctx.device), draws)
            train_step(net, optimizer, x, labels, r.lr, ctx.precision, Skips())

        return step

    return prepare


def answering(ctx: Context, net: nn.Module) -> Prepare:
    """A classifier's answer to augmented images: what caching logits takes, and measuring on a split, all but the augmentation."""
    net.eval()

    def prepare(n: int) -> Callable[[], object]:
        plain, draws = to_float(some_images(ctx, n)[0], ctx.device), some_draws(n)

        @torch.no_grad()
        def step() -> object:
            with autocast(ctx.device, ctx.precision):
                return net(ctx.augment(plain, draws)).float().cpu()

        return step

    return prepare


def drawing(ctx: Context, generator: Generator) -> Prepare:
    """Drawing images as a user gets them."""
    return lambda n: lambda: draw(ctx, generator, np.arange(n) % ctx.classes, 0, "dry-run", 0, batch=n)


def painting(ctx: Context, generator: Generator) -> Prepare:
    """A grid of samples for TensorBoard, without its frame."""

    def prepare(n: int) -> Callable[[], object]:
        z = torch.from_numpy(normal(0, "dry-run", 0, np.arange(n), generator.latent)).to(ctx.device)
        labels = (torch.arange(n) % ctx.classes).to(ctx.device)
        return torch.no_grad()(lambda: generator(z, labels).cpu())

    return prepare


def labelling(ctx: Context, frozen: Frozen) -> Prepare:
    """Soft labels of the report's students."""

    def prepare(n: int) -> Callable[[], object]:
        x = to_float(some_images(ctx, n)[0], ctx.device)
        frozen.soft_labels(x[:1], 1.0)  # loads the teachers
        return lambda: frozen.soft_labels(x, ctx.config.report.label_temperature)

    return prepare
