"""kill -9 at any time, the same command again: the same weights, bit for bit (design 5.4). Four ranks: two cannot show it."""

import functools
import json
import signal
import time
from pathlib import Path

import hooks
import pytest
import ranks
from events import scalars
from safetensors.torch import load_file

SIZE = 4
STEPS = ["teachers", "logits", "gaussian", "gan", "matching"]


def at_sixty_percent(step: str, folder: Path):
    """A hook that kills a rank when 60 % of the step are done; in gan and matching not the one that writes checkpoints."""
    marker = folder / "dead"
    return {
        "teachers": functools.partial(hooks.die_in_teachers, marker=marker, step=11),  # of 18
        "logits": functools.partial(hooks.die_in_logits, marker=marker, files=15),  # of 24
        "gan": functools.partial(hooks.die_in_gan, victim=2, step=8),  # of 12
        "matching": functools.partial(hooks.die_in_matching, victim=2, step=8),  # of 12
    }[step]


def killed(out: Path, argv: list[str], hook, whole: bool) -> ranks.Ended:
    """Run until the hook has killed its rank; the others die with it (whole) or get the SIGTERM of torchrun."""
    job = ranks.start(out, argv, SIZE, before=hook)
    job.until(lambda: any(p.exitcode == -signal.SIGKILL for p in job.processes))
    if whole:
        job.send(signal.SIGKILL)
        return job.wait()
    return job.wait_as_torchrun()


def assert_same_numbers(undisturbed, out: Path, found) -> None:
    for step in STEPS:
        assert found[step]["fingerprint"] == undisturbed.steps[step]["fingerprint"]
        one, two = (root / step / found[step]["fingerprint"] for root in (undisturbed.out, out))
        names = sorted(p.relative_to(one) for p in one.rglob("*") if p.suffix in (".safetensors", ".npy", ".pt"))
        assert names
        for name in names:
            assert ranks.weights(one / name) == ranks.weights(two / name), f"{step}/{name}"
    a, b = (root / "matching" / "latest" / "generator.safetensors" for root in (undisturbed.out, out))
    first, second = load_file(a), load_file(b)
    assert first.keys() == second.keys()
    assert all(first[k].equal(second[k]) for k in first)


def case(step: str, whole: bool, fast: bool):
    name = f"{step}-{'whole job' if whole else 'one rank'}"
    return pytest.param(step, whole, id=name, marks=[] if fast else [pytest.mark.slow])


@pytest.mark.parametrize(
    ("step", "whole"),
    [
        case("teachers", whole=True, fast=True),
        case("logits", whole=False, fast=True),
        case("gan", whole=True, fast=True),
        case("matching", whole=False, fast=True),
        case("teachers", whole=False, fast=False),
        case("logits", whole=True, fast=False),
        case("gan", whole=False, fast=False),
        case("matching", whole=True, fast=False),
    ],
)
def test_after_a_kill_the_same_command_ends_with_the_same_weights(undisturbed, tmp_path, step, whole):
    before = STEPS[: STEPS.index(step)]
    store = undisturbed.copy(tmp_path / "out", *before)
    ended = killed(store, undisturbed.argv, at_sixty_percent(step, tmp_path), whole)
    assert -signal.SIGKILL in ended.codes
    if not whole:
        assert all("stopped:" in text for code, text in zip(ended.codes, ended.err, strict=True) if code != -9)
        assert not ended.errors, ended.text
    fp = undisturbed.steps[step]["fingerprint"]
    assert (store / step / f"{fp}.partial").is_dir()
    assert not (store / step / fp).exists()
    # Rank 0 holds it, and gives it back if it can still leave; in logits it may be the one that was killed.
    assert (store / "run.lock").exists() == (ended.codes[0] == -signal.SIGKILL)

    found = ranks.train(store, undisturbed.argv, SIZE)
    statuses = [found[s]["status"] for s in STEPS]
    later = STEPS[STEPS.index(step) + 1 :]
    assert statuses == ["reused"] * len(before) + ["resumed"] + ["computed"] * len(later)
    assert 0 < found[step]["images_processed"] < 0.7 * undisturbed.steps[step]["images_processed"]
    assert_same_numbers(undisturbed, store, found)
    assert not list(store.glob("*/*.partial"))

    if step in ("gan", "matching", "teachers"):  # TensorBoard: no point twice, none lost
        one, two = (scalars(out / "tensorboard" / step) for out in (undisturbed.out, store))
        for tag in one:
            if "images_per_second" not in tag:
                assert two[tag] == one[tag], tag
            assert two[tag].keys() == one[tag].keys(), tag


def test_an_interrupted_run_may_go_on_with_another_number_of_ranks(undisturbed, tmp_path):
    store = undisturbed.copy(tmp_path / "out", "teachers", "logits")
    argv = [*undisturbed.argv, "--until", "gan"]
    killed(store, argv, at_sixty_percent("gan", tmp_path), whole=True)
    found = ranks.train(store, argv, 2)
    assert found["gan"]["status"] == "resumed"
    assert found["gan"]["fingerprint"] == undisturbed.steps["gan"]["fingerprint"]
    one, two = (scalars(out / "tensorboard" / "gan") for out in (undisturbed.out, store))
    for tag in ("gan/loss_g", "gan/loss_d"):
        assert list(two[tag]) == list(range(12))
        assert list(two[tag].values()) == pytest.approx(list(one[tag].values()), rel=1e-4)


def test_after_a_kill_in_the_report_students_that_were_trained_are_not_trained_again(reported, tmp_path):
    out = reported.copy(tmp_path / "out", *STEPS)
    hook = functools.partial(hooks.die_in_report, marker=tmp_path / "dead", students=16)  # of 26
    job = ranks.start(out, reported.argv, 2, before=hook)
    job.until(lambda: any(p.exitcode == -signal.SIGKILL for p in job.processes))
    assert not job.wait_as_torchrun().errors
    found = ranks.train(out, reported.argv, 2)
    assert found["report"]["status"] == "resumed"
    assert 0 < found["report"]["images_processed"] < 0.7 * reported.steps["report"]["images_processed"]
    one, two = (json.loads((o / "report" / "latest" / "metrics.json").read_text()) for o in (reported.out, out))
    assert two["results"] == one["results"]  # by one process and by two ranks


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.13, 0.41, 0.97, 1.7, 2.9])
def test_killed_again_and_again_at_any_time_it_ends_with_the_same_weights(undisturbed, tmp_path, delay):
    """Not at a chosen place: the whole job, a while after the first, second, … step began."""
    out = tmp_path / "out"
    for step in STEPS:
        job = ranks.start(out, undisturbed.argv, SIZE)
        job.until(lambda s=step: (out / s).exists())
        time.sleep(delay)
        job.send(signal.SIGKILL)
        job.wait()
    assert_same_numbers(undisturbed, out, ranks.train(out, undisturbed.argv, SIZE))
