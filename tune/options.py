"""The search's command line: its own options, and any setting of the trainer. What it says is kept in OUT/search.yaml for --resume."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from gdd_dist import config as configuration
from gdd_dist.arguments import Parser
from gdd_dist.settings import Config
from sharding.errors import UserError
from sharding.files import write_atomic
from tune import space
from tune.proposals import ALGORITHMS
from tune.space import Axis

SCHEDULERS = ("asha", "fifo")
METRICS = {
    "val": "accuracy of the kept generator's quick students on val",
    "lower": "the same minus its standard error",
}
FILE = "search.yaml"
_FORMAT = "gdd-search/1"
_REFUSED = ("until", "print_config", "print-config", "dry_run", "dry-run")
_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True)
class Options:
    """The search's own options. ``time_budget`` in seconds; ``max_concurrent`` 0: as many as fit."""

    trials: int = 12
    max_concurrent: int = 0
    time_budget: float | None = None
    address: str | None = None
    cpus_per_trial: float = 1.0
    gpus_per_trial: float | None = None
    ranks_per_trial: int = 1
    scheduler: str = "asha"
    algorithm: str = "random"
    metric: str = "val"
    final_seeds: int = 3


ELSEWHERE = (
    "trials",
    "max_concurrent",
    "time_budget",
    "address",
    "cpus_per_trial",
    "gpus_per_trial",
    "ranks_per_trial",
    "final_seeds",
)
"""Options that a --resume may change: how much and where, not what is compared."""


@dataclass(frozen=True)
class Search:
    """A search as it was asked for. ``config``: the plain defaults that trials differ from, data and store still as typed."""

    out: Path
    options: Options
    config: Config
    preset: str
    axes: tuple[Axis, ...] = field(default=space.SPACE)


@dataclass(frozen=True)
class Command:
    """A parsed command line; the search is a new one unless ``resume``."""

    search: Search
    resume: bool


def parser() -> argparse.ArgumentParser:
    """The search's own options; what is not given is None."""
    d = Options()
    p = Parser(
        prog="python tune/search.py",
        allow_abbrev=False,
        description="Search temperature, loss weights and learning rate of matching. Shards, teachers, logits and GAN are computed once; "
        "a trial is the trainer's own matching step, judged by quick students on val. Ends with a table, best.yaml and search.md.",
        epilog="Any setting of gdd_dist.train may be given too (--data, --store, --preset, --config FILE, --matching.steps 1000 …): it holds "
        "for all trials. The same command with --resume, or --out alone with it, goes on with an interrupted search.",
    )
    p.add_argument("--out", metavar="DIR", default="runs/search", help="where everything goes (default %(default)s)")
    p.add_argument("--space", metavar="FILE", help="YAML file that changes the space; --print-space prints an example")
    p.add_argument("--print-space", action="store_true", help="print the space as YAML and exit")
    p.add_argument(
        "--trials", type=int, metavar="N", help=f"trials, the plain defaults (trial 0) among them (default {d.trials})"
    )
    p.add_argument("--max-concurrent", type=int, metavar="N", help="trials at a time; 0: as many as fit (default 0)")
    p.add_argument(
        "--time-budget", type=_seconds, metavar="T", help="stop the trials after this long: 600, 30m, 2h (default none)"
    )
    p.add_argument(
        "--address",
        metavar="HOST:PORT",
        help="a running Ray cluster, auto: the one on this host (default: a local Ray)",
    )
    p.add_argument(
        "--cpus-per-trial", type=float, metavar="N", help=f"CPUs of a rank of a trial (default {d.cpus_per_trial:g})"
    )
    p.add_argument(
        "--gpus-per-trial",
        type=float,
        metavar="N",
        help="GPUs of a rank of a trial (default: 1 if the cluster has any)",
    )
    p.add_argument(
        "--ranks-per-trial",
        type=int,
        metavar="N",
        help=f"ranks of a trial, which may span nodes (default {d.ranks_per_trial})",
    )
    p.add_argument(
        "--scheduler", metavar="NAME", help="asha: stop trials that lag behind; fifo: run all to the end (default asha)"
    )
    p.add_argument("--algorithm", metavar="NAME", help="random, or optuna: its TPE sampler (default random)")
    metrics = "; ".join(f"{k}: {v}" for k, v in METRICS.items())
    p.add_argument("--metric", metavar="NAME", help=f"what the best trial is best in; {metrics} (default {d.metric})")
    p.add_argument("--final-seeds", type=int, metavar="N", help="new seeds that best and defaults are retrained with and read on test "
                   f"(default {d.final_seeds}; 0: do not)")  # fmt: skip
    p.add_argument("--resume", action="store_true", help="go on with the search in --out")
    return p


def _seconds(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text} is no time; give seconds, or 30m, or 2h")
    return float(found[1]) * _UNITS[found[2]]


def parse(argv: Sequence[str]) -> Command:
    """Raises UserError for what does not fit; SystemExit(0) after --help and --print-space."""
    own, rest = _split(argv)
    given = parser().parse_args(own)
    axes = space.load(given.space)
    if given.print_space:
        sys.stdout.write(space.dump(axes))
        raise SystemExit(0)
    out = Path(given.out)
    typed = {f.name: getattr(given, f.name) for f in dataclasses.fields(Options) if getattr(given, f.name) is not None}
    if given.resume:
        return Command(_resumed(out, typed, rest, given.space), resume=True)
    command = configuration.parse(rest)
    options = dataclasses.replace(Options(), **typed)
    check_options(options)
    space.check(axes, command.config)
    return Command(Search(out, options, command.config, command.preset, axes), resume=False)


def check_options(o: Options) -> None:
    """Raise UserError for the first option that makes no sense, whatever the cluster."""
    for name, choices in (("scheduler", SCHEDULERS), ("algorithm", ALGORITHMS), ("metric", tuple(METRICS))):
        if getattr(o, name) not in choices:
            raise UserError(f"--{name} {getattr(o, name)} is not known; choose {' or '.join(choices)}")
    for name, low in (("trials", 1), ("max_concurrent", 0), ("ranks_per_trial", 1), ("final_seeds", 0)):
        if getattr(o, name) < low:
            raise UserError(f"--{name.replace('_', '-')} {getattr(o, name)} is too small; give at least {low}")
    if o.time_budget is not None and o.time_budget <= 0:
        raise UserError("--time-budget 0 leaves no time; give more")
    if not 0 < o.cpus_per_trial < float("inf"):
        raise UserError(f"--cpus-per-trial {o.cpus_per_trial:g} is too small; give more than 0")
    if o.gpus_per_trial is not None and not 0 <= o.gpus_per_trial < float("inf"):
        raise UserError(f"--gpus-per-trial {o.gpus_per_trial:g} is too small; give at least 0")


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The search's own options, and those of the trainer."""
    actions = {name: a for a in parser()._actions for name in a.option_strings}
    trainer = {name for name, _, _ in configuration.options()} | {"preset", "config", "no_verify"}
    own: list[str] = []
    rest: list[str] = []
    at = 0
    while at < len(argv):
        name, eq, _ = argv[at].partition("=")
        action = actions.get(name)
        if action is not None:
            n = 1 if eq or action.nargs == 0 else 2
            own += argv[at : at + n]
            at += n
            continue
        _check_known(argv[at], name, trainer, actions)
        rest.append(argv[at])
        at += 1
    return own, rest


def _check_known(token: str, name: str, trainer: set[str], actions: Mapping[str, Any]) -> None:
    """Refuse what neither the search nor the trainer knows, and what a search cannot do."""
    if not name.startswith("--"):
        return
    bare = name[2:]
    if bare in _REFUSED:
        raise UserError(f"{name} is no option of a search; give it to python -m gdd_dist.train")
    if bare in trainer or bare.replace("-", "_") in trainer:
        return
    near = difflib.get_close_matches(name, [*actions, *(f"--{t}" for t in sorted(trainer))], n=1, cutoff=0.5)
    raise UserError(f"unknown option {name}; {f'did you mean {near[0]}?' if near else 'see --help'}")


def save(search: Search) -> None:
    """OUT/search.yaml."""
    tree = {
        "format": _FORMAT,
        "options": dataclasses.asdict(search.options),
        "space": yaml.safe_load(space.dump(search.axes)),
        "config": yaml.safe_load(configuration.to_yaml(search.config, search.preset)),
    }
    write_atomic(search.out / FILE, yaml.safe_dump(tree, sort_keys=False).encode())


def load(out: Path) -> Search:
    """The search in OUT. Raises UserError where there is none, or its file is damaged."""
    path = out / FILE
    if not path.exists():
        raise UserError(f"{out} holds no search to resume ({FILE} is missing); leave out --resume to begin one")
    try:
        tree = yaml.safe_load(path.read_text())
        if tree["format"] != _FORMAT:
            raise ValueError(tree["format"])
        options = Options(**tree["options"])
        axes = tuple(space._axis(name, body, str(path)) for name, body in tree["space"].items())
        body = tree["config"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as e:
        raise UserError(f"{path} is damaged ({' '.join(str(e).split())}); begin anew with another --out") from e
    command = configuration.parse(["--config", str(_config_file(out, body))])
    return Search(out, options, command.config, command.preset, axes)


def _config_file(out: Path, body: Mapping[str, Any]) -> Path:
    """The settings as a file of their own, which the trainer's parser reads."""
    path = out / "defaults.yaml"
    write_atomic(path, yaml.safe_dump(dict(body), sort_keys=False).encode())
    return path


def _resumed(out: Path, typed: Mapping[str, Any], rest: Sequence[str], space_file: str | None) -> Search:
    """The search in OUT with what may be changed."""
    search = load(out)
    changed = {name for name, value in typed.items() if getattr(search.options, name) != value} - set(ELSEWHERE)
    if changed:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(changed))
        raise UserError(
            f"{names} cannot be changed by --resume: trials would not compare; begin anew with another --out"
        )
    if space_file is not None and space.load(space_file) != search.axes:
        raise UserError(
            "--space cannot be changed by --resume: trials would not compare; begin anew with another --out"
        )
    config = _same(search, rest)
    options = dataclasses.replace(search.options, **{"time_budget": None, **typed})  # a budget is one invocation's
    check_options(options)
    return dataclasses.replace(search, options=options, config=config)


def _same(search: Search, rest: Sequence[str]) -> Config:
    """The kept settings; typed ones must agree with them, but for those that say only where or how fast."""
    if not rest:
        return search.config
    kept = str(search.out / "defaults.yaml")
    typed = configuration.parse(["--config", kept, *rest]).config
    for name, _, f in configuration.options():
        section, _, leaf = name.rpartition(".")
        old, new = (getattr(getattr(c, section) if section else c, leaf) for c in (search.config, typed))
        if old != new and (not f.metadata["where"] or name in ("data", "store")):
            raise UserError(f"--{name} cannot be changed by --resume; begin anew with another --out")
    return typed
