"""A grid: every combination of a space's choices, each with the same seeds of matching, beside the plain defaults."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from gdd_dist.config.settings import Config
from sharding.errors import UserError
from tune import space
from tune.space import Axis

SEED = "matching.seed"


def check(axes: Sequence[Axis]) -> None:
    """Raise UserError for an axis that gives a grid no choices."""
    if ranges := [axis.setting for axis in axes if not axis.choices]:
        cure = "give it {choices: [...]} in a --space FILE"
        raise UserError(f"a grid needs choices, and {ranges[0]} has none; {cure}")


def seed_axis(config: Config, seeds: int) -> Axis:
    """The seeds of a grid, counted from the seed of matching."""
    first = config.step_seed("matching")
    return Axis(SEED, choices=tuple(range(first, first + seeds)))


def combinations(axes: Sequence[Axis], config: Config) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(settings to compare with the defaults, settings that cannot be trained), in the order of the choices."""
    names, plain = [axis.setting for axis in axes], space.values(axes, config)
    choices = [dict.fromkeys(axis.choices) for axis in axes]
    every = (dict(zip(names, values, strict=True)) for values in itertools.product(*choices))
    found = [settings for settings in every if settings != plain]
    fit = [settings for settings in found if space.trainable(config, settings)]
    return fit, [settings for settings in found if settings not in fit]


def plan(axes: Sequence[Axis], config: Config, seeds: int) -> list[dict[str, Any]]:
    """Settings of trials 0, 1, …: the defaults and all combinations with the first seed, then with the next, so more seeds come last."""
    arms: list[dict[str, Any]] = [{}, *combinations(axes, config)[0]]
    _, *others = seed_axis(config, seeds).choices
    return arms + [{**settings, SEED: seed} for seed in others for settings in arms]
