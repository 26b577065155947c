"""kill -9 at any time, the same command again: the same weights, bit for bit (design 5.4). Four ranks: two cannot show it."""

import functools
import signal
from pathlib import Path

import hooks
import pytest
import ranks
from events import scalars
from safetensors.torch import load_file

SIZE = 4
STEPS = ["teachers", "logits", "gan", "matching"]


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
    assert (store / "run.lock").exists()

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


def test_a_lost_part_of_the_state_would_be_noticed(undisturbed, tmp_path):
    """The negative control: without the optimizers' moments the resumed weights differ."""
    store = undisturbed.copy(tmp_path / "out", "teachers", "logits")
    argv = [*undisturbed.argv, "--until", "gan"]
    killed(store, argv, at_sixty_percent("gan", tmp_path), whole=True)
    found = ranks.train(store, argv, SIZE, before=hooks.forget_moments)
    assert found["gan"]["status"] == "resumed"
    a, b = (out / "gan" / found["gan"]["fingerprint"] / "generator.safetensors" for out in (undisturbed.out, store))
    assert ranks.weights(a) != ranks.weights(b)


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.13, 0.41, 0.97, 1.7, 2.9])
def test_killed_again_and_again_at_any_time_it_ends_with_the_same_weights(undisturbed, tmp_path, delay):
    """Not at a chosen place: the whole job, a while after the first, second, … step began."""
    out = tmp_path / "out"
    for step in STEPS:
        job = ranks.start(out, undisturbed.argv, SIZE)
        job.until(lambda s=step: bool(list((out / s).glob("*.partial"))))
        signal.sigtimedwait([], delay)
        job.send(signal.SIGKILL)
        job.wait()
    assert_same_numbers(undisturbed, out, ranks.train(out, undisturbed.argv, SIZE))
