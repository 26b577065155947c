"""A loss that is not finite on one rank skips the step on all; many in a row go back once, then end the run."""

import functools
import json

import hooks
import pytest
import ranks
import torch
from safetensors.torch import load_file
from test_deepspeed_runs import deepspeed

LOSSES = ["relativistic_discriminator", "relativistic_generator"]
GAN = ["--gan.steps", "24", "--until", "gan"]


def info(out):
    return json.loads((out / "gan" / "latest" / "contents.json").read_text())["info"]


@pytest.mark.parametrize("where", LOSSES)
def test_one_bad_loss_on_one_rank_skips_that_step_on_all_and_is_counted(undisturbed, tmp_path, where):
    out = undisturbed.copy(tmp_path / "out", "teachers", "logits")
    hook = functools.partial(hooks.spoil, where=where, calls=range(5, 6), victim=1)
    ended = ranks.start(out, [*undisturbed.argv, "--until", "gan"], 2, before=hook).wait()
    assert ended.codes == [0, 0], ended.text
    line = "gan: step 5 skipped on all ranks, its loss or gradient is not finite (1 in all)"
    assert ended.text.count("skipped") == ended.err[0].count(line) == 1
    assert info(out)["skipped_steps"] == 1
    state = torch.load(out / "gan" / "latest" / "discriminator-state.pt", weights_only=True)["optimizer"]["state"]
    assert {int(s["step"]) for s in state.values()} == {11 if where == LOSSES[0] else 12}


@pytest.mark.parametrize(
    "stage", [pytest.param(0, marks=pytest.mark.slow), 1, *(pytest.param(s, marks=pytest.mark.slow) for s in (2, 3))]
)
def test_deepspeed_skips_it_on_all_ranks_too(undisturbed, tmp_path, stage):
    out = undisturbed.copy(tmp_path / "out", "teachers", "logits")
    hook = functools.partial(hooks.spoil, where=LOSSES[1], calls=range(5, 6), victim=1)
    argv = [*undisturbed.argv, "--until", "gan", *deepspeed(tmp_path, stage)]
    ended = ranks.start(out, argv, 2, before=hook).wait()
    assert ended.codes == [0, 0], ended.text
    assert "gan: step 5 skipped on all ranks" in ended.err[0]
    assert info(out)["skipped_steps"] == 1
    weights = load_file(out / "gan" / "latest" / "generator.safetensors")
    assert all(w.isfinite().all() for w in weights.values())


def test_ten_in_a_row_go_back_to_the_last_checkpoint_once_with_another_draw_of_noise(undisturbed, tmp_path):
    out = undisturbed.copy(tmp_path / "out", "teachers", "logits")
    hook = functools.partial(hooks.spoil, where=LOSSES[1], calls=range(7, 17), victim=1)
    ended = ranks.start(out, [*undisturbed.argv, *GAN], 2, before=hook).wait()
    assert ended.codes == [0, 0], ended.text
    assert "going back to the last checkpoint, with different noise" in ended.err[0]
    assert info(out)["skipped_steps"] == 0  # what was skipped did not come true
    assert ranks.steps(out)["gan"]["status"] == "resumed"


def test_when_it_does_not_help_the_run_ends_with_one_line_and_its_last_checkpoint_is_finite(undisturbed, tmp_path):
    out = undisturbed.copy(tmp_path / "out", "teachers", "logits")
    hook = functools.partial(hooks.spoil, where=LOSSES[0], calls=range(7, 1000), victim=1)
    line = ranks.refused(out, [*undisturbed.argv, *GAN], 2, before=hook)
    assert (
        "gan: 10 steps in a row had a loss or gradient that is not finite, also after going back to a checkpoint"
        in line
    )
    assert "lower --gan.lr" in line
    newest = max(out.glob("gan/*.partial/checkpoints/step-*.pt"))
    assert newest.name == "step-000000007.pt"
    found = torch.load(newest, weights_only=True)
    assert all(t.isfinite().all() for net in ("g", "d") for t in found[net]["module"].values())


def test_a_learning_rate_that_explodes_is_said_with_the_setting_to_lower(undisturbed, tmp_path):
    line = ranks.refused(tmp_path / "out", [*undisturbed.argv, "--teachers.lr", "1e30", "--teachers.epochs", "2"])
    assert "teachers: convnet:8 seed " in line
    assert "lower --teachers.lr" in line
