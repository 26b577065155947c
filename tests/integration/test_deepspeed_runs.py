"""--engine deepspeed: from the same artifacts the losses of DDP, and runs that change engine and ranks on their way."""

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import hooks
import numpy as np
import pytest
import ranks
from events import scalars
from test_torchrun import LONG_GAN, steps_done, wait_for

FIRST = 12


def losses(out, step, *names):
    """The first points of each loss, float64 [names, steps]."""
    found = scalars(out / "tensorboard" / step)
    return np.array([[found[f"{step}/{name}"][i] for i in range(FIRST)] for name in names])


def deepspeed(tmp_path, stage):
    """Command line of a ZeRO stage that cuts parameters of any size."""
    path = tmp_path / f"zero-{stage}.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}}))
    return ["--engine", "deepspeed", "--deepspeed-config", str(path)]


EVERY = [(0, 2), (1, 2), (2, 2), (3, 2), (0, 4), (1, 4), (2, 4), (3, 4)]


@pytest.mark.parametrize(
    ("stage", "size"), [case if case in ((3, 2),) else pytest.param(*case, marks=pytest.mark.slow) for case in EVERY]
)
def test_gan_and_matching_have_ddps_losses(undisturbed, tmp_path, stage, size):
    store = undisturbed.copy(tmp_path / "store", "teachers", "logits")
    argv = [*undisturbed.argv, "--store", str(store), *deepspeed(tmp_path, stage)]
    found = ranks.train(tmp_path / "out", argv, size)
    assert found["gan"]["status"] == found["matching"]["status"] == "computed"
    assert found["gan"]["fingerprint"] == undisturbed.steps["gan"]["fingerprint"]  # the engine is in none
    for step, names in (("gan", ("loss_g", "loss_d")), ("matching", ("loss", "loss_d"))):
        expected = losses(undisturbed.out, step, *names)
        assert np.allclose(losses(tmp_path / "out", step, *names), expected, rtol=1e-4, atol=0)


def test_micro_batches_change_no_losses(undisturbed, tmp_path):
    store = undisturbed.copy(tmp_path / "store", "teachers", "logits")
    ranks.train(tmp_path / "out", [*undisturbed.argv, "--store", str(store), "--accumulate", "4"], 2)
    for step, names in (("gan", ("loss_g", "loss_d")), ("matching", ("loss", "loss_d"))):
        expected = losses(undisturbed.out, step, *names)
        assert np.allclose(losses(tmp_path / "out", step, *names), expected, rtol=1e-4, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("step", ["gan", "matching"])
def test_a_run_goes_from_ddp_to_deepspeed_to_ddp_at_other_numbers_of_ranks(undisturbed, tmp_path, step):
    """Killed at step 4 of 4 ranks under DDP, at 8 of 2 ranks under ZeRO 3, ended by one process."""
    kept = ("teachers", "logits") + (("gan",) if step == "matching" else ())
    out = undisturbed.copy(tmp_path / "out", *kept)
    argv = [*undisturbed.argv, "--until", step]
    die = {"gan": hooks.die_in_gan, "matching": hooks.die_in_matching}[step]
    for extra, size, at in (([], 4, 4), (deepspeed(tmp_path, 3), 2, 8)):
        ended = ranks.start(out, [*argv, *extra], size, before=partial(die, victim=0, step=at)).wait_as_torchrun()
        assert -9 in ended.codes, ended.text
    assert ranks.train(out, argv, 1)[step]["status"] == "resumed"
    names = ("loss_g", "loss_d") if step == "gan" else ("loss", "loss_d")
    assert np.allclose(losses(out, step, *names), losses(undisturbed.out, step, *names), rtol=1e-4, atol=0)


@pytest.mark.slow
def test_a_run_killed_under_zero_3_ends_with_the_bits_of_one_that_was_not(undisturbed, tmp_path):
    ends = []
    for name in ("whole", "killed"):
        out = undisturbed.copy(tmp_path / name, "teachers", "logits")
        argv = [*undisturbed.argv, *deepspeed(tmp_path, 3)]
        if name == "killed":
            ranks.start(out, argv, 4, before=partial(hooks.die_in_gan, victim=1, step=5)).wait_as_torchrun()
            ranks.start(out, argv, 4, before=partial(hooks.die_in_matching, victim=2, step=7)).wait_as_torchrun()
        found = ranks.train(out, argv, 4)
        directory = out / "matching" / found["matching"]["fingerprint"]
        ends.append([ranks.weights(directory / "generator.safetensors")])
    assert ends[0] == ends[1]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_its_launcher_reaches_the_ranks_who_save_and_leave(undisturbed, tmp_path, number):
    out = undisturbed.copy(tmp_path / "out", "teachers", "logits")
    script = Path(__file__).parents[2] / "launchers" / "deepspeed.sh"
    env = {"BIN": str(Path(sys.executable).parent), "RANKS": "2", "PORT": str(ranks.free_port()), "OUT": str(out)}
    job = subprocess.Popen(
        [script, *undisturbed.argv, *LONG_GAN],
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        wait_for(lambda: steps_done(out) >= 5 or job.poll() is not None)
        job.send_signal(number)
        text, _ = job.communicate(timeout=60)
    finally:
        job.kill()
    assert job.returncode
    assert text.count("all is saved, the same command goes on from here") == 2, text
    assert json.loads((out / "preempted").read_text())["step"] == "gan"


def test_wrong_use_is_said_in_one_line(undisturbed, tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"train_batch_size": 64}))
    argv = [*undisturbed.argv, "--engine", "deepspeed", "--deepspeed-config", str(path)]
    assert "--gan.batch" in ranks.refused(tmp_path / "out", argv)
    argv = [*undisturbed.argv, "--deepspeed-config", str(path)]
    assert "--engine deepspeed" in ranks.refused(tmp_path / "out", argv)
    argv = [*undisturbed.argv, "--accumulate", "3"]
    assert "--accumulate 3" in ranks.refused(tmp_path / "out", argv)
