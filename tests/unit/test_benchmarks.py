"""The two sides of the benchmarks of matching do what they say, and the benchmarks run."""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import dim
import logit_cache
import matching_step
from made_up import before_matching, jpegs
from made_up import matching_step as step_of

from gdd_dist.data.logit_cache import logit_file
from gdd_dist.dry_run.estimates import estimate_logits
from gdd_dist.models.files import read_teachers
from gdd_dist.steps import logits

TEACHERS = "--teachers.architectures convnet:8 "
SMALL = (
    "--teachers.seeds 2 --teachers.snapshots 2 --logits.views 2 --gan.width 16 --gan.d_width 16 "
    "--matching.batch 16 --matching.group 2 --matching.steps 12 --gaussian.components 16"
)


@pytest.fixture
def trial(digits, tmp_path):
    """Made-up steps before matching, of four teachers."""
    return before_matching(tmp_path / "run", digits, ["--preset", "digits", *(TEACHERS + SMALL).split()])


def test_dims_step_forwards_what_the_reference_does_and_trains_all_three():
    batch, seen = 4, dict.fromkeys(("generator", "critic", "classifier"), 0)
    labels = torch.arange(batch)
    classifier = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 10))
    it = dim.DiM(classifier, 10, lambda: (torch.rand(batch, 3, 32, 32) * 2 - 1, labels), width=4, iterations=3)

    def count(name):
        def hook(_net, inputs):
            seen[name] += len(inputs[0])

        return hook

    for name in seen:
        getattr(it, name).register_forward_pre_hook(count(name))
    weights = [
        p for name in seen for p in getattr(it, name).parameters() if p.dim() > 1
    ]  # some biases have no gradient
    before = [p.detach().clone() for p in weights]
    it.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, weights, strict=True))
    assert seen == {"generator": 2 * batch, "critic": 4 * batch, "classifier": (3 + 2) * batch}


def test_dims_networks_have_the_sizes_of_the_reference():
    """Counted on gan_model.py of the reference."""
    weights = [sum(p.numel() for p in net.parameters()) for net in (dim.generator(196), dim.Critic(10, 196))]
    assert weights == [3_559_363, 3_137_971]


def test_what_is_answered_anew_is_what_the_logits_step_caches(trial):
    dirs = trial.directories
    for teacher in read_teachers(dirs["teachers"]):
        for shard in range(len(trial.shards)):
            found = logits.answer(trial.ctx, trial.ctx.teacher(teacher), shard, lambda _: None)
            np.save(logit_file(dirs["logits"], teacher.index, shard), found)
    pools = logit_cache.pools(trial)
    for number in range(3):
        groups = pools["cached"].dealer.batch(number).by_teacher()
        cached, anew = (pools[side].real_logits(groups) for side in logit_cache.SIDES)
        assert set(groups.views) == {0, 1}
        assert cached.std() > 0.01
        torch.testing.assert_close(cached, anew, rtol=2e-3, atol=1e-4)


def test_forwards_are_those_that_are_counted(trial, tmp_path):
    """By the dry run, of the cache; and by both sides of a step."""
    config, train = trial.ctx.config, sum(trial.shards)
    assert logit_cache.forwards(config, train) == (estimate_logits(trial, tmp_path / "none").images, 12 * 16)
    counted = []
    for pool in logit_cache.pools(trial).values():
        step, before = step_of(trial, pool), trial.ctx.forwards
        step()
        counted.append(trial.ctx.forwards - before)
    assert counted[1] - counted[0] == 16


def test_the_matching_steps_are_compared(tmp_path):
    own = {"batch": 16, "rounds": 2, "seconds": 0.0, "iterations": 1, "dim_width": 4, "presets": ["cifar10-cpu"]}
    args = argparse.Namespace(**own, settings=SMALL.split())
    (found,) = matching_step.compare(tmp_path / "run", jpegs(tmp_path, 60, 32), "convnet:8", args)
    assert len(found["ratios"]) == 2
    assert min(found["ratios"]) > 0
    assert found["settings"]["teachers"] == 4
    assert found["wall"]["ours"] > 0
    work = found["gflop_an_image"]
    assert work["ours"] > 0
    assert work["ratio"] == pytest.approx(work["DiM"] / work["ours"], rel=0.1)


def test_the_cache_is_compared_and_breaks_even(tmp_path, capsys):
    own = {"architectures": None, "batch": 16, "images": 60, "rounds": 2, "seconds": 0.0}
    logit_cache.compare("digits", tmp_path, argparse.Namespace(**own, settings=(TEACHERS + SMALL).split()))
    step, answers, even = map(json.loads, capsys.readouterr().out.splitlines())
    assert [step["benchmark"], answers["benchmark"]] == ["logit_cache/step", "logit_cache/answers"]
    assert answers["ratio"] > 1
    cost, runs = even["milliseconds"]["convnet:8"], even["runs"]
    assert even["forwards"] == {"cache": 4 * even["settings"]["train"] * 2, "run": 12 * 16}
    assert runs["by time"] == pytest.approx(runs["by forwards"] * cost["cache"] / cost["run"], rel=0.5)
