"""The two sides of the benchmark of the matching step do what they say, and it runs."""

import argparse
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import dim
import matching_step
from made_up import jpegs

SMALL = (
    "--teachers.seeds 2 --teachers.snapshots 2 --logits.views 2 --gan.width 16 --gan.d_width 16 "
    "--matching.batch 16 --matching.group 2 --matching.steps 12 --gaussian.components 16"
)


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
