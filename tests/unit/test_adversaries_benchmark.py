"""benchmarks/adversaries.py: the terms that it compares do what their papers say, and each of its rows moves the Gaussians of a run."""

import argparse
import sys
from pathlib import Path

import pytest
import ranks
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import adversaries
from adversaries import Heads, drift


def test_drift_moves_towards_real_features_and_spreads_where_these_are_met():
    rng = torch.Generator().manual_seed(0)
    real = torch.randn(64, 5, generator=rng) + 3.0
    fake = torch.randn(64, 5, generator=rng).requires_grad_()
    (away,) = torch.autograd.grad(drift(fake, real), fake)
    assert (-away).mean(0).min() > 0  # downhill is towards the real ones
    narrow = (0.1 * torch.randn(64, 5, generator=rng) + 3.0).requires_grad_()
    (away,) = torch.autograd.grad(drift(narrow, real), narrow)
    assert float(((narrow.detach() - 3.0) * -away).sum()) > 0  # downhill is away from each other


def test_heads_learn_to_tell_maps_apart_and_send_generated_ones_to_the_real_side():
    rng = torch.Generator().manual_seed(0)
    heads, labels = Heads(2), torch.tensor([0, 1]).repeat(8)
    real, fake = (torch.randn(16, 3, 4, 4, generator=rng) + shift for shift in (0.5, -0.5))
    fake.requires_grad_()
    for _ in range(60):
        term = heads(0, [fake], [real], labels, 4)
    (gradient,) = torch.autograd.grad(term, fake)
    assert float(((real.mean() - fake.mean()) * -gradient.mean()).detach()) > 0
    assert all(not p.requires_grad for p in heads.parameters())  # the generator's backward leaves them alone


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    argv = ["--gaussian.components", "4", "--gaussian.spread", "1.0", "--until", "matching"]
    ended = ranks.start(out, [*tiny, *argv]).wait()
    assert ended.codes == [0], ended.text
    return out


@pytest.mark.parametrize("row", ["none", "discriminator", "heads", "drift alone"])
def test_each_row_moves_the_gaussians(row, run):
    before = dict(adversaries.terms.before(run))["gaussian"]
    args = argparse.Namespace(weight=0.1, seconds=0.1)
    net, cost = adversaries.moved(run, row, args, ["--matching.lr=1e-2"])
    assert cost["steps"] >= 1
    assert not net.class_means.equal(before.class_means)
    assert net.class_means.isfinite().all()
