"""The search's command line: its own options, and any setting of the trainer. OUT/search.yaml keeps all for --resume."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from gdd_dist.config import command_line as configuration
from gdd_dist.config.bounds import options, value_of
from gdd_dist.config.settings import Config
from sharding.errors import UserError
from sharding.files import write_atomic
from sharding.redact import redact
from tune import space
from tune.arguments import FIXED, GRID, SMALL, TRAINERS, Options, options_of, parser
from tune.space import Axis

FILE, KEPT = "search.yaml", "defaults.yaml"
_FORMAT = "gdd-search/1"
_REFUSED = ("until", "print_config", "print-config", "dry_run", "dry-run")


@dataclass(frozen=True)
class Search:
    """A search, new or (``resume``) continued. ``config``: the plain defaults that trials differ from."""

    out: Path
    options: Options
    config: Config
    preset: str
    axes: tuple[Axis, ...] = space.SPACE
    resume: bool = False

    @property
    def columns(self) -> tuple[Axis, ...]:
        """Return what trials differ in: the axes, and in a grid the seed of matching."""
        if self.options.algorithm != GRID:
            return self.axes
        return (*self.axes, space.seed_axis(self.config, self.options.seeds))

    @property
    def new_seeds(self) -> tuple[int, ...]:
        """Return the seeds of matching of the retrainings, which no trial has."""
        o = self.options
        first = self.config.step_seed("matching") + (o.seeds if o.algorithm == GRID else 1)
        return tuple(range(first, first + o.final_seeds))


def parse(argv: Sequence[str]) -> Search:
    """Return the search that is asked for. Raises UserError for a wrong command line, SystemExit(0) after --help and --print-space."""
    own, rest = _split(argv)
    given = parser().parse_args(own)
    out, alone = Path(given.out), given.algorithm == GRID
    if given.print_space:
        sys.stdout.write(space.dump(space.load(given.space, alone)))
        raise SystemExit(0)
    typed = {f.name: getattr(given, f.name) for f in dataclasses.fields(Options) if getattr(given, f.name) is not None}
    if given.resume:
        return _resumed(out, typed, rest, given.space)
    options = options_of(typed)
    axes, command = space.load(given.space, alone), configuration.parse(rest or SMALL)
    space.check(axes, command.config)
    return _sized(Search(out, options, command.config, command.preset, axes))


def _sized(search: Search) -> Search:
    """Return the search; a grid determines its number of trials, and from which seed of matching it counts."""
    if search.options.algorithm != GRID:
        return search
    space.check_grid(search.axes)
    config = space.apply(search.config, {space.SEED: search.config.step_seed("matching")})
    trials = len(space.grid(search.axes, config, search.options.seeds))
    return dataclasses.replace(search, config=config, options=dataclasses.replace(search.options, trials=trials))


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Divide the command line into the search's own options and those of the trainer."""
    actions = {name: a for a in parser()._actions if a.dest not in TRAINERS for name in a.option_strings}
    trainer = {name for name, _, _ in options()} | {"preset", "config", "no_verify"}
    own: list[str] = []
    rest: list[str] = []
    tokens = iter(argv)
    for token in tokens:
        name, eq, _ = token.partition("=")
        if (action := actions.get(name)) is None:
            _check_known(name, trainer, actions)
            rest.append(token)
        else:
            own.append(token)
            own += [] if eq or action.nargs == 0 else itertools.islice(tokens, 1)  # its value
    return own, rest


def _check_known(name: str, trainer: set[str], actions: Mapping[str, Any]) -> None:
    """Raise UserError for an option that neither the search nor the trainer knows, and for one that a search cannot obey."""
    if not name.startswith("--"):
        return
    bare = name[2:]
    if bare in _REFUSED:
        raise UserError(f"{name} is not an option of a search; use it with python -m gdd_dist.train")
    if bare in trainer or bare.replace("-", "_") in trainer:
        return
    near = difflib.get_close_matches(name, [*actions, *(f"--{t}" for t in sorted(trainer))], n=1, cutoff=0.5)
    raise UserError(f"unknown option {name}; {f'did you mean {near[0]}?' if near else 'see --help'}")


def save(search: Search) -> None:
    """Write OUT/search.yaml, without keys of URLs; --data must be typed again if it has any."""
    tree = {
        "format": _FORMAT,
        "options": dataclasses.asdict(search.options),
        "space": yaml.safe_load(space.dump(search.axes)),
        "config": yaml.safe_load(configuration.to_yaml(search.config, search.preset)),
    }
    write_atomic(search.out / FILE, redact(yaml.safe_dump(tree, sort_keys=False)).encode())


def load(out: Path) -> Search:
    """Return the search in OUT. Raises UserError if there is none, or its file is damaged."""
    path = out / FILE
    if not path.exists():
        raise UserError(f"{out} holds no search to resume ({FILE} is missing); leave out --resume to start one")
    try:
        tree = yaml.safe_load(path.read_bytes())
        if tree["format"] != _FORMAT:
            raise ValueError(tree["format"])
        options = Options(**tree["options"])
        axes = tuple(space._axis(name, body, str(path)) for name, body in tree["space"].items())
        body = yaml.safe_dump(dict(tree["config"]), sort_keys=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as e:
        raise UserError(f"{path} is damaged ({' '.join(str(e).split())}); start again with another --out") from e
    write_atomic(out / KEPT, body.encode())  # the trainer's parser reads a file
    command = configuration.parse(["--config", str(out / KEPT)])
    return Search(out, options, command.config, command.preset, axes, resume=True)


def _resumed(out: Path, typed: Mapping[str, Any], rest: Sequence[str], space_file: str | None) -> Search:
    """Return the search in OUT with the ``typed`` changes, if --resume may make them."""
    search = load(out)
    changed = [f"--{name}" for name in FIXED if name in typed and typed[name] != getattr(search.options, name)]
    alone = search.options.algorithm == GRID
    if space_file is not None and space.load(space_file, alone) != search.axes:
        changed.append("--space")
    if changed:
        what = f"{', '.join(changed)} cannot be changed by --resume, because trials could not be compared"
        raise UserError(f"{what}; start again with another --out")
    config = _same(search, rest)
    options = options_of({"time_budget": None, **typed}, search.options)  # a budget is one invocation's
    return _sized(dataclasses.replace(search, options=options, config=config))


def _same(search: Search, rest: Sequence[str]) -> Config:
    """Return the kept settings with typed ones, which may only change where or how fast trials run. Raises UserError."""
    if not rest:
        return search.config
    typed = configuration.parse(["--config", str(search.out / KEPT), *rest]).config
    for name, _, f in options():
        old, new = (value_of(c, name) for c in (search.config, typed))
        if name == "data" and old and new:
            old, new = redact(old), redact(new)
        if old != new and (not f.metadata["where"] or name in ("data", "store")):
            raise UserError(f"--{name} cannot be changed by --resume; start again with another --out")
    return typed
