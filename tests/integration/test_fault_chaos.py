"""Killed at random, again and again, it ends with the weights of an undisturbed run; a lost part of the state would show."""

import functools
import json
import shutil

import chaos
import hooks
import pytest
import ranks
from test_kill import SIZE, assert_same_numbers


@pytest.mark.parametrize("count", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_so_many_random_kills_and_the_weights_are_those_of_an_undisturbed_run(undisturbed, tmp_path, count):
    """Fifty: all steps, as often as it takes; `make chaos`. Five: up to matching, in `make test`."""
    argv = [*undisturbed.argv, "--until", "report" if count > 5 else "matching"]
    life, results = 0, []
    for n, kill in enumerate(chaos.kills(seed=count, count=count)):
        hit = False
        while not hit:
            out = tmp_path / f"life-{life}"
            hit = chaos.live(out, argv, SIZE, kill, tmp_path / f"dead-{n}")
            chaos.assert_nothing_torn(out)
            if not hit:  # it ended before this kill came: a new run, which this kill hits
                assert_same_numbers(undisturbed, out, ranks.steps(out))
                results += reports(out)
                life += 1
    out = tmp_path / f"life-{life}"
    found = ranks.train(out, argv, SIZE)
    chaos.assert_nothing_torn(out)
    assert_same_numbers(undisturbed, out, found)
    assert not [p for p in out.rglob("*") if p.name.startswith(".") or p.suffix in (".partial", ".lock", ".dead")]
    results += reports(out)
    assert all(r == results[0] for r in results)


def reports(out):
    return [json.loads(p.read_text())["results"] for p in out.glob("report/latest/metrics.json")]


@pytest.fixture(scope="module")
def interrupted(reported, tmp_path_factory):
    """One process, killed after 8 of 12 steps of the gan, with a checkpoint at each."""
    out = reported.copy(tmp_path_factory.mktemp("interrupted") / "out", "teachers", "logits")
    argv = [*reported.argv, "--until", "gan", "--checkpoint_seconds", "0"]
    ended = ranks.start(out, argv, before=functools.partial(hooks.die_in_gan, victim=0, step=8)).wait()
    assert ended.codes == [-9]
    return out, argv


@pytest.mark.parametrize("part", ["nothing", *hooks.PARTS])
def test_leaving_any_one_part_of_the_state_out_of_the_checkpoint_makes_the_weights_differ(
    interrupted, reported, tmp_path, part
):
    """The negative control: what is compared can tell."""
    source, argv = interrupted
    out = shutil.copytree(source, tmp_path / "out", symlinks=True)
    before = None if part == "nothing" else functools.partial(hooks.forget, part=part)
    found = ranks.train(out, argv, before=before)
    assert found["gan"]["status"] == "resumed"
    names = ("generator.safetensors", "discriminator.safetensors", "discriminator-state.pt")
    one, two = (root / "gan" / found["gan"]["fingerprint"] for root in (reported.out, out))
    same = [ranks.weights(one / name) == ranks.weights(two / name) for name in names]
    assert all(same) == (part == "nothing"), same
