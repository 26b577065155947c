"""The teachers of matching: their logits on generated images, and the cache of their logits on real ones.

Shapes: B slots of this rank, in G groups of n with one class and one teacher, sorted by teacher; C classes, H W pixels.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gdd_dist.data.logit_cache import LogitCache
from gdd_dist.engines.precision import autocast
from gdd_dist.models.files import read_teachers
from gdd_dist.steps.matching_groups import Dealer, Groups
from gdd_dist.training import losses
from gdd_dist.training.context import Context
from gdd_dist.training.teacher_features import Features, features, real_features


class Pool:
    """The frozen teachers and the cache of their logits on real images."""

    real: dict[int, Features]
    """By teacher, its features of real images; empty unless the loss compares features."""

    def __init__(self, ctx: Context, teachers_dir: Path, logits_dir: Path) -> None:
        m, pool = ctx.config.matching, read_teachers(teachers_dir)
        chosen = [t for t in pool if m.teachers == "all" or t.last]
        self._ctx, self._nets = ctx, {t.index: ctx.teacher(t) for t in chosen}
        images = ctx.images("train")
        self.cache = LogitCache(logits_dir, images.shards.shard_samples)
        self.views = min(m.views or self.cache.views, self.cache.views)
        self._means = self.cache.class_means[:, : self.views].mean(1)
        self.dealer = Dealer(ctx.config, images.labels, np.array([t.index for t in chosen]), self.views)
        self.real = {}

    def look(self) -> None:
        """Take the teachers' features of real images, if the loss compares them."""
        if self._ctx.config.matching.lambda_feature:
            seed = self._ctx.config.step_seed("matching")
            for teacher, net in self._nets.items():
                self._ctx.world.check_stop()
                self.real[teacher] = real_features(self._ctx, net, seed, "matching/features", self.views)

    def real_logits(self, groups: Groups) -> Tensor:
        """Return the cached logits of each pair's real image, float32 [B, C]. Groups are sorted by teacher."""
        parts, first = [], 0
        for teacher, count in groups.runs():
            here = slice(first, first + count)
            parts.append(self.cache.take(teacher, groups.samples[here], groups.views[here]))
            first += count
        return torch.from_numpy(np.concatenate(parts))

    def class_means(self, groups: Groups) -> Tensor:
        """Return the mean logits of each group's class over train, by the group's teacher: float32 [G, C]."""
        return torch.from_numpy(self._means[groups.teachers, groups.classes])

    def answer(
        self, images: Tensor, labels: Tensor, groups: Groups, draws: Tensor, plain: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Return what each group's teacher makes of float images [B, channels, H, W] with ``labels`` int64 [B]: logits float32 [B, C],
        and the distance of its mean features from real ones (`losses.mean_feature`; None unless the loss has it). Both differentiable.

        Images are augmented by ``draws`` [B, AUGMENT_DRAWS], except ``plain`` ones, bool [B], whose real view is not augmented either.
        """
        ctx, runs = self._ctx, groups.runs()
        seen = torch.where(plain[:, None, None, None], images, ctx.augment(images, draws))
        parts = seen.split([count for _, count in runs])
        if not self.real:
            with autocast(ctx.device, ctx.precision):
                answers = [self._nets[teacher](part) for (teacher, _), part in zip(runs, parts, strict=True)]
            return torch.cat(answers).float(), None
        found, distance = [], images.new_zeros(())
        for (teacher, count), part, y in zip(runs, parts, labels.split([n for _, n in runs]), strict=True):
            feature, logits = features(ctx, self._nets[teacher], part)
            real, groupwise = self.real[teacher], feature.unflatten(0, (-1, groups.size))
            apart = losses.mean_feature(real.mean[y[:: groups.size]], groupwise, real.variance)
            distance = distance + apart * (count / len(images))
            found.append(logits)
        return torch.cat(found), distance
