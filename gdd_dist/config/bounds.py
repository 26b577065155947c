"""Every setting by its full name, and the values that it may have."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, get_type_hints

from gdd_dist.config.settings import CONDENSED, SECTIONS, Config, Matching
from sharding.errors import UserError
from sharding.sizes import parse_size

LARGEST_COUNT = 2**31 - 1
"""With this limit, the product of two counts fits in 64 bits."""
LARGEST_SEED = 2**63 - 1
LARGEST_FLOAT = 1e30
"""Networks compute in float32, whose largest value is 3e38."""


def options() -> Iterator[tuple[str, type, dataclasses.Field[Any]]]:
    """Yield (name, type, field) of every setting: ``seed``, …, ``matching.temperature``, …"""
    for section in (None, *SECTIONS):
        owner: Any = Config if section is None else type(getattr(Config(), section))
        hints = get_type_hints(owner)
        for f in dataclasses.fields(owner):
            if section is not None or f.name not in SECTIONS:
                yield (f.name if section is None else f"{section}.{f.name}"), hints[f.name], f


def value_of(config: Config, name: str) -> Any:
    """Return the value of a setting by its full name."""
    section, _, leaf = name.rpartition(".")
    return getattr(getattr(config, section) if section else config, leaf)


WEIGHTS = tuple(f"matching.{f.name}" for f in dataclasses.fields(Matching) if f.name.startswith("lambda_"))
"""The weights of the terms of matching's loss."""


def validate(config: Config) -> None:
    """Raise UserError for the first setting outside its bounds."""
    for name, _, f in options():
        value = value_of(config, name)
        for item in value if isinstance(value, tuple) else (value,):
            _check(name, item, f.metadata)
        if value == ():
            raise UserError(f"--{name} is empty; give at least one value")
    for name in ("loader.augment", "gan.augment"):
        augment = value_of(config, name)
        if augment != "none" and not set(augment.split("_")) <= {"color", "crop", "cutout"}:
            raise UserError(f"--{name} {augment} is not known; join color, crop, cutout by _, or give none")
    parse_size(config.loader.cache_limit)
    if not any(value_of(config, name) for name in WEIGHTS):
        raise UserError(f"every weight of matching's loss is 0, so it trains nothing; give --{WEIGHTS[0]} or another")
    if config.report.condense and "fixed" in config.report.protocol and max(config.report.ipc) > CONDENSED:
        what = f"--report.condense moves all images of a class together, and --report.ipc is {max(config.report.ipc)}"
        raise UserError(f"{what}; give at most {CONDENSED}, or leave --report.condense out")
    batch, group = config.matching.batch, config.matching.group
    if batch % group:
        what = f"--matching.batch {batch} is not a multiple of --matching.group {group}"
        raise UserError(f"{what}; change one of them")


def _check(name: str, value: Any, meta: Mapping[str, Any]) -> None:
    if value is None:
        return
    if meta["choices"] and value not in meta["choices"]:
        raise UserError(f"--{name} {value} is not known; choose {', '.join(meta['choices'])}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"--{name} {value} is not a finite number; give one")
    if meta["low"] is not None and value < meta["low"]:
        raise UserError(f"--{name} {value} is too small; give at least {meta['low']}")
    if meta["above"] is not None and value <= meta["above"]:
        raise UserError(f"--{name} {value} is too small; give more than {meta['above']}")
    if meta["high"] is not None and value > meta["high"]:
        raise UserError(f"--{name} {value} is too large; give at most {meta['high']}")
    if meta["below"] is not None and value >= meta["below"]:
        raise UserError(f"--{name} {value} is too large; give less than {meta['below']}")
    most = LARGEST_FLOAT if isinstance(value, float) else LARGEST_SEED if name.endswith("seed") else LARGEST_COUNT
    if isinstance(value, (int, float)) and abs(value) > most:
        raise UserError(f"--{name} {value} is too large; give at most {most}")
