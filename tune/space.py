"""What is searched: settings of matching with their ranges, as data, and the grid of their choices. `--space FILE.yaml` changes them.

Only matching is searched: teachers, logits and GAN are computed once and serve every trial.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_type_hints

import yaml

from gdd_dist.config.bounds import validate
from gdd_dist.config.settings import Config, Matching
from gdd_dist.config.yaml_files import read_yaml
from sharding.errors import UserError

SECTION, SEED = "matching", "matching.seed"
_TYPES: Mapping[str, Any] = get_type_hints(Matching)
MEASURE = ("seed", "select", "interval", "quick_students", "quick_student", "quick_steps", "quick_batch")
"""Settings of matching that change the measurement, so trials that differ in them could not be compared."""


@dataclass(frozen=True)
class Axis:
    """One searched setting: a range (``low`` … ``high``, uniform in its logarithm if ``log``) or ``choices``.

    ``zero``: share of draws that are exactly 0, which switches a loss term off. ``why``: for the reader.
    """

    setting: str
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    zero: float = 0.0
    choices: tuple[Any, ...] = ()
    why: str = ""

    @property
    def leaf(self) -> str:
        """Return the setting's name within its section."""
        return self.setting.rpartition(".")[2]

    @property
    def type(self) -> type:
        """Return int, float or str, as the trainer declares it."""
        return _TYPES[self.leaf]

    def ends(self) -> tuple[Any, ...]:
        """Return values to check, because all are valid if these are: the ends of a range, and 0 if it is drawn; or every choice."""
        if self.choices:
            return self.choices
        return (*((0,) if self.zero else ()), self.low, self.high)


SPACE: tuple[Axis, ...] = (
    Axis("matching.temperature", 0.5, 8.0, log=True, why="softmax temperature of the standardized logits"),
    Axis("matching.lambda_pair", 0.1, 10.0, log=True, zero=0.1, why="weight of the pair loss"),
    Axis("matching.lambda_mean", 0.01, 1.0, log=True, zero=0.2, why="weight of the class-mean loss"),
    Axis("matching.lambda_adv", 0.03, 3.0, log=True, zero=0.1, why="weight of the adversarial loss"),
    Axis("matching.lr", 5e-5, 2e-3, log=True, why="learning rate of the generator"),
    Axis("matching.teachers", choices=("all", "last"), why="all snapshots, or only the last of each training"),
    Axis("matching.views", choices=(0, 1, 2), why="number of cached views used; 0: all, 1: only the plain image"),
)


def apply(config: Config, settings: Mapping[str, Any]) -> Config:
    """Return the configuration of a trial. ``settings``: full names → values."""
    leaves = {name.rpartition(".")[2]: value for name, value in settings.items()}
    return dataclasses.replace(config, matching=dataclasses.replace(config.matching, **leaves))


def values(axes: Sequence[Axis], config: Config) -> dict[str, Any]:
    """Return the value in ``config`` of every searched setting."""
    return {axis.setting: getattr(config.matching, axis.leaf) for axis in axes}


def trainable(config: Config, settings: Mapping[str, Any]) -> bool:
    """Whether the trainer takes these settings together; it needs one loss term, for example."""
    try:
        validate(apply(config, settings))
    except UserError:
        return False
    return True


def load(path: str | None, alone: bool = False) -> tuple[Axis, ...]:
    """Return the space changed by a YAML file: setting → {low, high, log, zero}, {choices} or null. ``alone``: only what the file names."""
    if path is None:
        return SPACE
    return merged(read_yaml(path, "--space", "--print-space prints an example"), path, () if alone else SPACE)


def merged(tree: Mapping[str, Any], source: str, base: Sequence[Axis] = SPACE) -> tuple[Axis, ...]:
    """Return ``base`` changed by ``tree``, whose new axes come last. Raises UserError that names the file ``source``."""
    axes: dict[str, Axis] = {axis.setting: axis for axis in base}
    for name, body in tree.items():
        if body is None and str(name) not in {f"{SECTION}.{leaf}" for leaf in _TYPES}:
            raise UserError(f"{name} in {source} is no setting of matching; see --print-space")
        if body is None:
            axes.pop(str(name), None)
        else:
            axes[str(name)] = _axis(str(name), body, source)
    if not axes:
        raise UserError(f"{source} leaves nothing to search; keep at least one setting")
    return tuple(axes.values())


def _axis(name: str, body: Any, source: str) -> Axis:
    """Return one axis of a file. Raises UserError."""
    fields = {f.name for f in dataclasses.fields(Axis)} - {"setting"}
    if not isinstance(body, dict) or not set(body) <= fields:
        raise UserError(f"{name} in {source} must have some of {', '.join(sorted(fields))}; see --print-space")
    if "choices" in body and set(body) & {"low", "high", "log", "zero"}:
        raise UserError(f"{name} in {source} has choices and a range; keep one of them")
    if not isinstance(body.get("log", False), bool):
        raise UserError(f"log of {name} in {source} is {body['log']}; give true or false")
    choices = body.get("choices", ())
    if not isinstance(choices, (list, tuple)):
        raise UserError(f"choices of {name} in {source} is not a list; give one")
    # A 0 among fractions is 0.0 to the trainer; fingerprints and TensorBoard's page tell the two apart.
    real = _TYPES.get(name.rpartition(".")[2]) is float
    return Axis(name, **{**body, "choices": tuple(float(c) if real and type(c) is int else c for c in choices)})


def text(value: Any) -> str:
    """Return a value as tables show it."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def counted(count: int, noun: str) -> str:
    """Return text such as 1 trial, 2 trials."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def dump(axes: Sequence[Axis]) -> str:
    """Return the space as YAML that --space reads."""
    tree = {}
    for axis in axes:
        values = dataclasses.asdict(axis) | {"choices": list(axis.choices)}
        tree[axis.setting] = {k: v for k, v in values.items() if k != "setting" and v not in (0.0, [], "")}
    return yaml.safe_dump(tree, sort_keys=False)


def check(axes: Sequence[Axis], config: Config) -> None:
    """Raise UserError for an axis that names no setting of matching, or a value that the trainer would refuse."""
    for axis in axes:
        section, _, leaf = axis.setting.partition(".")
        if section != SECTION or leaf not in _TYPES:
            why = "only matching.NAME can, because other settings would need new teachers, logits or GAN"
            raise UserError(f"{axis.setting} cannot be searched: {why}")
        if leaf in MEASURE:
            raise UserError(f"{axis.setting} cannot be searched: it changes the measurement that compares the trials")
        _check_range(axis)
        for value in axis.ends():
            allowed = (int, float) if axis.type is float else axis.type
            if isinstance(value, bool) or not isinstance(value, allowed):
                raise UserError(f"{axis.setting}: {value!r} is not a valid {axis.type.__name__}; give one")
            validate(apply(config, {axis.setting: axis.type(value)}))


def _check_range(axis: Axis) -> None:
    if axis.choices:
        return
    name, low, high = axis.setting, axis.low, axis.high
    # Not isinstance: a bool would be an int.
    if axis.type is str or not {type(low), type(high), type(axis.zero)} <= {int, float}:
        raise UserError(f"{name} needs choices, or low, high and zero as numbers")
    if not low < high or (axis.log and low <= 0) or not 0 <= axis.zero < 1:
        raise UserError(f"{name}: low must be below high (and above 0 with log), zero from 0 to below 1")


def check_grid(axes: Sequence[Axis]) -> None:
    """Raise UserError for an axis that gives a grid no choices."""
    if ranges := [axis.setting for axis in axes if not axis.choices]:
        cure = "give it {choices: [...]} in a --space FILE"
        raise UserError(f"a grid needs choices, and {ranges[0]} has none; {cure}")


def seed_axis(config: Config, seeds: int) -> Axis:
    """Return the seeds of a grid as an axis, counted from the seed of matching."""
    first = config.step_seed("matching")
    return Axis(SEED, choices=tuple(range(first, first + seeds)))


def combinations(axes: Sequence[Axis], config: Config) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return (settings to compare with the defaults, settings that cannot be trained), in the order of the choices."""
    names, plain = [axis.setting for axis in axes], values(axes, config)
    choices = [dict.fromkeys(axis.choices) for axis in axes]
    every = (dict(zip(names, combination, strict=True)) for combination in itertools.product(*choices))
    found = [settings for settings in every if settings != plain]
    fit = [settings for settings in found if trainable(config, settings)]
    return fit, [settings for settings in found if settings not in fit]


def grid(axes: Sequence[Axis], config: Config, seeds: int) -> list[dict[str, Any]]:
    """Return the settings of trials 0, 1, …: defaults and combinations with the first seed, then with the next, so new seeds come last."""
    arms: list[dict[str, Any]] = [{}, *combinations(axes, config)[0]]
    _, *others = seed_axis(config, seeds).choices
    return arms + [{**settings, SEED: seed} for seed in others for settings in arms]
