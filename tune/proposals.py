"""Which settings come next: Optuna's samplers over the space. Knows nothing of Ray.

What trial n gets depends on the seed, n and (TPE only) the trials that have ended, so a search that was interrupted draws on as if it
had not been.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import TrialState, create_trial

from sharding.errors import UserError
from tune.space import Axis

RANDOM_FIRST = 5
"""Trials that TPE draws at random before it models anything."""
ATTEMPTS = 100
_ZERO = "/zero"

optuna.logging.set_verbosity(optuna.logging.WARNING)


def distributions(axes: Sequence[Axis]) -> dict[str, BaseDistribution]:
    """Optuna's parameters: one an axis, and NAME/zero in [0, 1] where 0 is drawn with a share of its own (below the share: 0)."""
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
    """The value of one axis."""
    if axis.choices:
        return asked.suggest_categorical(axis.setting, axis.choices)
    if axis.zero and asked.suggest_float(axis.setting + _ZERO, 0.0, 1.0) < axis.zero:
        return axis.type(0)
    if axis.type is int:
        return asked.suggest_int(axis.setting, int(axis.low), int(axis.high), log=axis.log)
    return asked.suggest_float(axis.setting, axis.low, axis.high, log=axis.log)


class Proposals:
    """Asks for settings by trial number, is told how trials ended."""

    def __init__(
        self,
        axes: Sequence[Axis],
        algorithm: str,
        seed: int,
        sensible: Callable[[Mapping[str, Any]], bool] = lambda settings: True,
    ) -> None:
        self._axes, self._algorithm, self._seed, self._sensible = tuple(axes), algorithm, seed, sensible
        self._study = optuna.create_study(direction="maximize")
        self._numbers: dict[str, int] = {}

    def propose(self, trial: str) -> dict[str, Any]:
        """Settings of a new trial; raises UserError when the space holds hardly any that are ``sensible``."""
        for attempt in range(ATTEMPTS):
            state = np.random.SeedSequence([self._seed, int(trial), attempt]).generate_state(1)
            self._study.sampler = self._sampler(int(state[0]))
            asked = self._study.ask()
            settings = {axis.setting: _drawn(asked, axis) for axis in self._axes}
            if self._sensible(settings):
                self._numbers[trial] = asked.number
                return settings
            self._study.tell(asked, state=TrialState.FAIL)
        what = f"none of {ATTEMPTS} random settings from the space can be trained"
        raise UserError(f"{what}; check its ranges with --print-space")

    def remember(self, trial: str, settings: Mapping[str, Any]) -> None:
        """A trial that was proposed by an earlier invocation, or by nobody: the defaults, if they lie within the space."""
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
        """How a trial ended: its value, higher is better (of a stopped one what it had reached), or None if it failed."""
        number = self._numbers.pop(trial, None)
        if number is not None and value is None:
            self._study.tell(number, state=TrialState.FAIL)
        elif number is not None:
            self._study.tell(number, value)

    def _sampler(self, seed: int) -> BaseSampler:
        if self._algorithm == "random":
            return RandomSampler(seed=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return TPESampler(seed=seed, n_startup_trials=RANDOM_FIRST, constant_liar=True)


def _holds(known: BaseDistribution, value: Any) -> bool:
    """Whether a value lies within a range, or is one of the choices (of others Optuna knows no inner form)."""
    if isinstance(known, CategoricalDistribution):
        return value in known.choices
    return known._contains(known.to_internal_repr(value))
