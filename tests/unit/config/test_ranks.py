"""Who does what on how many ranks: a pure function, from one to more than a batch has images."""

import dataclasses

import pytest

from gdd_dist.config import command_line
from gdd_dist.config.presets import PRESETS
from gdd_dist.config.ranks import idle, parts, taking_part
from gdd_dist.config.settings import Config
from gdd_dist.pipeline.preflight import check_ranks


def settings(gan=256, matching=256, group=8, accumulate=1):
    config = Config()
    return dataclasses.replace(
        config,
        accumulate=accumulate,
        gan=dataclasses.replace(config.gan, batch=gan),
        matching=dataclasses.replace(config.matching, batch=matching, group=group),
    )


@pytest.mark.parametrize(
    ("world", "gan", "matching"),
    [(1, 1, 1), (3, 2, 2), (6, 4, 4), (12, 8, 8), (32, 32, 32), (48, 32, 32), (64, 64, 32), (512, 256, 32)],
)
def test_the_most_ranks_that_divide_the_batch_or_the_groups_take_part(world, gan, matching):
    config = settings()
    assert [taking_part(config, step, world) for step in ("gan", "matching")] == [gan, matching]
    assert all(taking_part(config, step, world) == world for step in ("teachers", "logits", "gaussian", "report"))


@pytest.mark.parametrize("world", range(1, 70))
def test_no_larger_number_would_do_and_each_rank_takes_whole_micro_batches(world):
    config = settings(gan=96, matching=120, group=5, accumulate=2)
    for step, shares in (("gan", 96), ("matching", 24)):
        n = taking_part(config, step, world)
        assert n <= world
        assert shares % (n * 2) == 0
        assert not [m for m in range(n + 1, world + 1) if shares % (m * 2) == 0]


@pytest.mark.parametrize("world", [2, 3, 6, 12, 48, 512])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_batch_that_is_named_would_use_all(world, accumulate):
    config = settings(gan=160, matching=128, accumulate=accumulate)
    said = idle(config, world)
    for step in ("gan", "matching"):
        waiting = world - taking_part(config, step, world)
        assert (f"{waiting} of {world} ranks wait during {step}, whose batch they cannot share evenly" in said) == (
            waiting > 0
        )
        if waiting:
            batch = int(said.partition(f"--{step}.batch ")[2].split()[0])
            changed = settings(**{"gan": 160, "matching": 128, "accumulate": accumulate, step: batch})
            assert taking_part(changed, step, world) == world
            assert batch - getattr(config, step).batch < world * getattr(config, step).batch / parts(config, step)


def test_nothing_is_said_where_nobody_waits():
    assert idle(settings(), 8) == ""
    assert idle(settings(), 64).count(";") == 1  # of matching alone: what is wrong; what to do
    assert "--matching.batch 512" in idle(settings(), 64)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_runs_on_any_number_of_ranks(preset):
    config = command_line.parse(["--preset", preset]).config
    for world in (1, 3, 6, 12, 24, 48, 64, 512):
        check_ranks(config, world)
        assert all(1 <= taking_part(config, step, world) <= world for step in ("gan", "matching"))
