"""Features of teachers: what they are, and from which real images their class means come."""

import dataclasses

import numpy as np
import pytest
import torch
from made_runs import Made, make, settings

from gdd_dist.data.images import to_float
from gdd_dist.evaluation.students import Frozen
from gdd_dist.training import teacher_features
from gdd_dist.training.context import Context
from gdd_dist.training.teacher_features import features, images_read, real_features

PURPOSE = "test"


@pytest.fixture(scope="module")
def made(digits, tmp_path_factory) -> Made:
    return make(tmp_path_factory.mktemp("features") / "out", digits)


@pytest.fixture
def ctx(made) -> Context:
    return made.context(settings())


@pytest.mark.parametrize("compiled", [False, True])
def test_features_are_what_the_last_layer_weighs(made, compiled) -> None:
    ctx = made.context(dataclasses.replace(settings(), compile=compiled))
    teacher = Frozen(ctx, made.dirs).teachers[0]
    images = torch.rand(5, 1, 16, 16) * 2 - 1
    feature, logits = features(ctx, teacher, images)
    last = [m for m in teacher.modules() if isinstance(m, torch.nn.Linear)][-1]
    torch.testing.assert_close(last(feature), logits)
    torch.testing.assert_close(type(teacher).forward(teacher, images), logits)


def test_real_features_come_from_at_most_so_many_images_of_a_class(made, ctx, monkeypatch) -> None:
    teacher = Frozen(ctx, made.dirs).teachers[0]
    monkeypatch.setattr(teacher_features, "REAL", 4)
    before = ctx.forwards
    found = real_features(ctx, teacher, 0, PURPOSE)
    assert ctx.forwards - before == 4 * ctx.classes == images_read(ctx.images("train").labels)
    assert found.mean.shape[0] == ctx.classes
    assert float(found.variance) > 0


def test_with_one_view_no_image_is_augmented(made, ctx) -> None:
    teacher, train = Frozen(ctx, made.dirs).teachers[0], ctx.images("train")
    found = real_features(ctx, teacher, 0, PURPOSE, views=1)
    members = np.flatnonzero(train.labels == 2)
    feature, _ = features(ctx, teacher, to_float(train.read(members), ctx.device))
    assert len(members) <= teacher_features.REAL  # so all of them are taken
    torch.testing.assert_close(found.mean[2], feature.mean(0))


def test_a_class_without_images_gets_the_mean_of_the_others(made, ctx, monkeypatch) -> None:
    teacher, train = Frozen(ctx, made.dirs).teachers[0], ctx.images("train")
    monkeypatch.setattr(train, "labels", np.where(train.labels == 3, 4, train.labels))
    found = real_features(ctx, teacher, 0, PURPOSE)
    others = [y for y in range(ctx.classes) if y != 3]
    torch.testing.assert_close(found.mean[3], found.mean[others].mean(0))
    assert found.variance.isfinite()
