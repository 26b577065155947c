"""Which settings come next: Optuna's samplers over the space.

The settings of trial n depend on the seed, n and (TPE only) the trials that have ended, so an interruption does not change them.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import TrialState, create_trial

from gdd_dist.config.settings import Config
from sharding.errors import UserError
from tune.space import Axis, trainable

RANDOM_FIRST = 5
"""Number of trials that TPE draws at random before it models anything."""
ATTEMPTS = 100
_ZERO = "/zero"

optuna.logging.set_verbosity(optuna.logging.WARNING)


def distributions(axes: Sequence[Axis]) -> dict[str, BaseDistribution]:
    """Return Optuna's parameters: one for each axis, and NAME/zero in [0, 1] if 0 has a share of the draws (below it, the value is 0)."""
    found: dict[str, BaseDistribution] = {}
    for axis in axes:
        if axis.choices:
            found[axis.setting] = CategoricalDistribution(axis.choices)
            continue
        if axis.zero:
            found[axis.setting + _ZERO] = FloatDistribution(0.0, 1.0)
        kind = IntDistribution if axis.type is int else FloatDistribution
        found[axis.setting] = kind(axis.type(axis.low), axis.type(axis.high), log=axis.log)
    return found


def _drawn(asked: optuna.Trial, axis: Axis) -> Any:
    """Draw the value of one axis."""
    if axis.choices:
        return asked.suggest_categorical(axis.setting, axis.choices)
    if axis.zero and asked.suggest_float(axis.setting + _ZERO, 0.0, 1.0) < axis.zero:
        return axis.type(0)
    if axis.type is int:
        return asked.suggest_int(axis.setting, int(axis.low), int(axis.high), log=axis.log)
    return asked.suggest_float(axis.setting, axis.low, axis.high, log=axis.log)


class Proposals:
    """Proposes settings by trial number, and learns how trials ended. ``config``: what the settings change, and the seed of the draws."""

    def __init__(self, axes: Sequence[Axis], algorithm: str, config: Config) -> None:
        self._axes, self._algorithm, self._config = tuple(axes), algorithm, config
        self._study = optuna.create_study(direction="maximize")
        self._numbers: dict[str, int] = {}

    def propose(self, trial: str) -> dict[str, Any]:
        """Return the settings of a new trial. Raises UserError if the space contains hardly any that can be trained."""
        for attempt in range(ATTEMPTS):
            state = np.random.SeedSequence([self._config.seed, int(trial), attempt]).generate_state(1)
            self._study.sampler = self._sampler(int(state[0]))
            asked = self._study.ask()
            settings = {axis.setting: _drawn(asked, axis) for axis in self._axes}
            if trainable(self._config, settings):
                self._numbers[trial] = asked.number
                return settings
            self._study.tell(asked, state=TrialState.FAIL)
        what = f"none of {ATTEMPTS} random settings from the space can be trained"
        raise UserError(f"{what}; check its ranges with --print-space")

    def remember(self, trial: str, settings: Mapping[str, Any]) -> None:
        """Add a trial of an earlier invocation, or the defaults, if they lie within the space."""
        known, shares = distributions(self._axes), {axis.setting: axis.zero for axis in self._axes}
        params: dict[str, Any] = {}
        for name, value in settings.items():
            if name + _ZERO in known:
                params[name + _ZERO] = (shares[name] + (value != 0)) / 2
                if value == 0:
                    continue
            if name not in known or not _holds(known[name], value):
                return
            params[name] = value
        used = {name: known[name] for name in params}
        self._study.add_trial(create_trial(state=TrialState.RUNNING, params=params, distributions=used))
        self._numbers[trial] = len(self._study.get_trials(deepcopy=False)) - 1

    def tell(self, trial: str, value: float | None) -> None:
        """Add how a trial ended: its value, higher is better (of a stopped trial the last one), or None if it failed."""
        if (number := self._numbers.pop(trial, None)) is not None:
            self._study.tell(number, value, TrialState.FAIL if value is None else None)

    def _sampler(self, seed: int) -> BaseSampler:
        if self._algorithm == "random":
            return RandomSampler(seed=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return TPESampler(seed=seed, n_startup_trials=RANDOM_FIRST, constant_liar=True)


def _holds(known: BaseDistribution, value: Any) -> bool:
    """Whether a value lies within a range, or is one of the choices, to which Optuna limits its own test."""
    if isinstance(known, CategoricalDistribution):
        return value in known.choices
    return known._contains(known.to_internal_repr(value))
