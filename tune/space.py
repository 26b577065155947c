"""What is searched: settings of matching with their ranges, as data. `--space FILE.yaml` changes them.

Only matching is searched: teachers, logits and GAN are computed once and serve every trial.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_type_hints

import yaml

from gdd_dist.config.bounds import validate
from gdd_dist.config.settings import Config, Matching
from gdd_dist.config.yaml_files import read_yaml
from sharding.errors import UserError

SECTION = "matching"
MEASURE = ("seed", "select", "interval", "quick_students", "quick_student", "quick_steps", "quick_batch")
"""Settings of matching that shape the measurement itself: trials that differ in them could not be compared."""


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
        """The setting's name within its section."""
        return self.setting.rpartition(".")[2]

    @property
    def type(self) -> type:
        """int, float or str, as the trainer declares it."""
        found: type = get_type_hints(Matching)[self.leaf]
        return found

    def ends(self) -> tuple[Any, ...]:
        """The values whose validity implies that of all: both ends of a range and 0 where it is drawn, or every choice."""
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
    """The configuration of a trial. ``settings``: full names → values."""
    leaves = {name.rpartition(".")[2]: value for name, value in settings.items()}
    return dataclasses.replace(config, matching=dataclasses.replace(config.matching, **leaves))


def values(axes: Sequence[Axis], config: Config) -> dict[str, Any]:
    """What ``config`` has for every searched setting."""
    return {axis.setting: getattr(config.matching, axis.leaf) for axis in axes}


def trainable(config: Config, settings: Mapping[str, Any]) -> bool:
    """Whether the trainer takes these settings together, and a loss term is left to train by."""
    drawn = apply(config, settings)
    try:
        validate(drawn)
    except UserError:
        return False
    return True


def load(path: str | None, alone: bool = False) -> tuple[Axis, ...]:
    """The space, changed by a YAML file: setting → {low, high, log, zero} or {choices}, or null to leave it out.

    ``alone``: what the file names and nothing else.
    """
    if path is None:
        return SPACE
    return merged(read_yaml(path, "--space", "--print-space prints an example"), path, () if alone else SPACE)


def merged(tree: Mapping[str, Any], source: str, base: Sequence[Axis] = SPACE) -> tuple[Axis, ...]:
    """``base`` with the axes of ``tree`` in their place; those it names and ``base`` has not come last."""
    axes: dict[str, Axis] = {axis.setting: axis for axis in base}
    for name, body in tree.items():
        if body is None and str(name) not in {f"{SECTION}.{f.name}" for f in dataclasses.fields(Matching)}:
            raise UserError(f"{name} in {source} is no setting of matching; see --print-space")
        if body is None:
            axes.pop(str(name), None)
        else:
            axes[str(name)] = _axis(str(name), body, source)
    if not axes:
        raise UserError(f"{source} leaves nothing to search; keep at least one setting")
    return tuple(axes.values())


def _axis(name: str, body: Any, source: str) -> Axis:
    """One axis of a file."""
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
    real = get_type_hints(Matching).get(name.rpartition(".")[2]) is float
    return Axis(name, **{**body, "choices": tuple(float(c) if real and type(c) is int else c for c in choices)})


def text(value: Any) -> str:
    """A value as tables show it."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def dump(axes: Sequence[Axis]) -> str:
    """The space as YAML that --space reads."""
    tree = {}
    for axis in axes:
        values = dataclasses.asdict(axis) | {"choices": list(axis.choices)}
        tree[axis.setting] = {k: v for k, v in values.items() if k != "setting" and v not in (0.0, [], "")}
    return yaml.safe_dump(tree, sort_keys=False)


def check(axes: Sequence[Axis], config: Config) -> None:
    """Raise UserError for an axis that names no setting of matching, or a value that the trainer would refuse."""
    leaves = {f.name for f in dataclasses.fields(Matching)}
    for axis in axes:
        section, _, leaf = axis.setting.partition(".")
        if section != SECTION or leaf not in leaves:
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
