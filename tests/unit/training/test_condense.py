"""Condensation: its loss against independent numpy, and what moving latents does to it."""

import numpy as np
import pytest
import torch
from made_runs import Made, make, settings

from gdd_dist.evaluation.students import Frozen
from gdd_dist.training import condense
from gdd_dist.training.condense import condensation, condensed
from gdd_dist.training.context import Context
from gdd_dist.training.teacher_features import Features

IPC, PURPOSE = 3, "test"


@pytest.fixture(scope="module")
def made(digits, tmp_path_factory) -> Made:
    return make(tmp_path_factory.mktemp("condense") / "out", digits)


@pytest.fixture
def ctx(made) -> Context:
    return made.context(settings())


def test_the_loss_is_cross_entropy_and_the_distance_of_mean_features() -> None:
    draw = np.random.default_rng(0)
    feature, logits, mean = draw.normal(size=(6, 5)), draw.normal(size=(6, 4)), draw.normal(size=(4, 5))
    labels, variance = np.array([1, 1, 1, 3, 3, 3]), 7.0
    shifted = np.exp(logits - logits.max(1, keepdims=True))
    probabilities = shifted / shifted.sum(1, keepdims=True)
    entropy = -np.log(probabilities[np.arange(6), labels]).mean()
    apart = [((feature[i : i + 3].mean(0) - mean[y]) ** 2).sum() for i, y in ((0, 1), (3, 3))]
    real = Features(torch.from_numpy(mean), torch.tensor(variance))
    found = condensation(*map(torch.from_numpy, (feature, logits, labels)), real, 3)
    assert float(found) == pytest.approx(entropy + np.mean(apart) / variance)


def test_moved_latents_bring_the_loss_down(made, ctx, monkeypatch) -> None:
    frozen, losses = Frozen(ctx, made.dirs), list[float]()

    def noted(*given):
        losses.append(float((value := condensation(*given)).detach()))
        return value

    monkeypatch.setattr(condense, "condensation", noted)
    condensed(ctx, frozen.generator("matched"), frozen.teachers, IPC, 0, PURPOSE, 40)
    assert np.mean(losses[-8:]) < np.mean(losses[:8])


def test_classes_are_moved_in_parts_without_another_result(made, ctx, monkeypatch) -> None:
    frozen = Frozen(ctx, made.dirs)

    def whole_set():
        return condensed(ctx, frozen.generator("gan"), frozen.teachers, IPC, 0, PURPOSE, 4).int()

    together = whole_set()
    monkeypatch.setattr(condense, "PART", 4 * IPC)
    assert (whole_set() - together).abs().float().mean() < 0.5  # of 255: another batch sums in another order
