"""--engine deepspeed: from the same artifacts the losses of DDP, and runs that change engine and ranks on their way."""

import json
import os
import shutil
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

NAMES = {"gan": ("loss_g", "loss_d"), "matching": ("loss", "loss_d")}
STEPS = 20
"""After which losses of two runs that differ in nothing but summation order are still compared."""


def losses(out, step, first=0, stop=STEPS):
    """Both networks' losses at these steps, float64 [2, steps]."""
    found = scalars(out / "tensorboard" / step)
    return np.array([[found[f"{step}/{name}"][i] for i in range(first, stop)] for name in NAMES[step]])


def long(step, steps):
    """Settings of a longer step; quick students measure at its ends alone."""
    return [f"--{step}.steps", str(steps), "--matching.interval", str(steps)]


@pytest.fixture(scope="module")
def twenty(request, undisturbed, tmp_path_factory):
    """(argv, directory) of STEPS steps of gan and matching under DDP on 2 ranks, from teachers and logits that all here share.

    The parameter is where the generator starts; "moved": at the Gaussian, and matching moves the Gaussian itself.
    """
    out = tmp_path_factory.mktemp("twenty") / "out"
    argv = [*undisturbed.argv, "--checkpoint_seconds", "600", *long("gan", STEPS), *long("matching", STEPS)]
    moved = request.param == "moved"
    argv += [
        "--gan.start",
        "gaussian" if moved else request.param,
        "--gaussian.components",
        "8",
        "--gaussian.spread",
        "1.0",
    ]
    argv += (
        ["--matching.start", "gaussian", "--matching.lambda_label", "1", "--matching.lambda_feature", "1"]
        if moved
        else []
    )
    undisturbed.copy(out, "teachers", "logits")
    ranks.train(out, argv, 2)
    return argv, out


def apart(name, found, expected):
    """Fails where losses differ by more than 1e-4 of their size; says by how much they do."""
    most = float((np.abs(found - expected) / np.abs(expected)).max())
    print(f"{name}: losses at most {most:.1e} apart")
    assert most <= 1e-4


def deepspeed(tmp_path, stage):
    """Command line of a ZeRO stage that cuts parameters of any size."""
    path = tmp_path / f"zero-{stage}.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}}))
    return ["--engine", "deepspeed", "--deepspeed-config", str(path)]


EVERY = [("noise", stage, size) for size in (2, 4) for stage in range(4)]
EVERY += [(start, stage, 2) for start in ("gaussian", "moved") for stage in range(4)]


@pytest.mark.parametrize(
    ("twenty", "stage", "size"),
    [case if case == ("noise", 3, 2) else pytest.param(*case, marks=pytest.mark.slow) for case in EVERY],
    indirect=["twenty"],
)
def test_the_first_twenty_losses_of_gan_and_matching_are_ddps(undisturbed, twenty, tmp_path, stage, size):
    argv, expected = twenty
    store = undisturbed.copy(tmp_path / "store", "teachers", "logits")
    found = ranks.train(tmp_path / "out", [*argv, "--store", str(store), *deepspeed(tmp_path, stage)], size)
    assert found["gan"]["status"] == found["matching"]["status"] == "computed"
    assert found["gan"]["fingerprint"] == ranks.steps(expected)["gan"]["fingerprint"]  # the engine is in none
    for step in NAMES:
        apart(f"ZeRO {stage}, {size} ranks, {step}", losses(tmp_path / "out", step), losses(expected, step))


def test_micro_batches_change_no_losses(undisturbed, tmp_path):
    store = undisturbed.copy(tmp_path / "store", "teachers", "logits")
    ranks.train(tmp_path / "out", [*undisturbed.argv, "--store", str(store), "--accumulate", "4"], 2)
    for step in NAMES:
        both = [losses(out, step, stop=12) for out in (tmp_path / "out", undisturbed.out)]
        apart(f"micro-batches, {step}", *both)


def go_on(out, argv, size, step, until):
    """Run on, logging each step, killed when ``until`` steps are done unless it has ended then."""
    die = {"gan": hooks.die_in_gan, "matching": hooks.die_in_matching}[step]
    before = partial(hooks.all_of, hooks=(hooks.log_every_step, partial(die, victim=0, step=until)))
    ended = ranks.start(out, argv, size, before=before).wait_as_torchrun()
    assert (-9 in ended.codes) == (until < 3 * STEPS), ended.text


@pytest.mark.slow
@pytest.mark.parametrize("step", list(NAMES))
def test_after_each_change_of_engine_and_ranks_twenty_losses_are_those_of_a_run_that_kept_both(
    undisturbed, tmp_path, step
):
    """DDP on 2 ranks, killed at step 20; ZeRO 3 on 4 ranks, killed at 40; DDP on 8 ranks to the end.

    At each kill a copy goes on from the same checkpoint as before.
    """
    out = undisturbed.copy(tmp_path / "out", "teachers", "logits", *(["gan"] if step == "matching" else []))
    argv = [*undisturbed.argv, "--until", step, *long(step, 3 * STEPS)]
    for i, (extra, size) in enumerate((([], 2), (deepspeed(tmp_path, 3), 4), ([], 8))):
        go_on(out, [*argv, *extra], size, step, (i + 1) * STEPS)
        if i < 2:
            kept = shutil.copytree(out, tmp_path / f"kept-{i}", symlinks=True)
            go_on(kept, [*argv, *extra], size, step, (i + 2) * STEPS)
    assert ranks.steps(out)[step]["status"] == "resumed"
    for i in range(2):
        both = (losses(o, step, (i + 1) * STEPS, (i + 2) * STEPS) for o in (out, tmp_path / f"kept-{i}"))
        apart(f"{step}, change {i + 1}", *both)


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
        text, _ = job.communicate(timeout=240)
    finally:
        job.kill()
    assert job.returncode
    assert text.count("all is saved, run the same command again to continue") == 2, text
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
    line = ranks.refused(tmp_path / "out", [*undisturbed.argv, "--engine", "deepspeed"], 3)
    assert "3 ranks do not divide the 16 images of --gan.batch 16; use 1, 2, 4, 8 or 16 ranks, or --engine ddp" in line
