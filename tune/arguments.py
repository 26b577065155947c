"""The search's own options: their names, their meaning, and which values make sense."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args, get_type_hints

from gdd_dist.config.settings import MOST
from gdd_dist.runtime.arguments import Parser
from sharding.errors import UserError

SCHEDULERS = ("asha", "fifo")
GRID = "grid"
ALGORITHMS = ("random", "optuna", GRID)
METRICS = {
    "val": "accuracy on val of quick students of the interval that matching chose",
    "lower": "the same minus its standard error",
}
TRAINERS = ("data", "preset", "config")
"""Options of the trainer that the help lists among the search's; the trainer's parser reads them."""
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
    seeds: int = 3


OF_GRID: dict[str, Any] = {"scheduler": "fifo", "final_seeds": 0}
"""Defaults of a grid: it compares whole trials, and its table is the result, so nothing is retrained."""

FIXED = ("algorithm", "metric", "scheduler")
"""Options that --resume may not change, because they say what is compared. The others say how much and where."""

SMALL = ("--matching.steps", "300", "--matching.interval", "100")
"""Settings of a search that was given none, so that the digits take minutes. best.yaml contains them, like all others."""

_D = Options()
_HELP = f"""
where
  --out DIR: where everything goes (default runs/search)
  --resume: continue the search in --out; its options need not be typed again
  --address HOST:PORT: head of a running Ray cluster; auto: the cluster of this host (default: start a local Ray on this host)
  --data DIR: data set made by python -m sharding build, or its URL (default: the digits, built in OUT/data)
  --preset NAME: the trainer's settings to start from (default: by the data set)
  --config FILE: YAML file of the trainer's settings
how much
  --trials N: number of trials, including the plain defaults as trial 0 (default {_D.trials}; grid: all combinations)
  --seeds N: grid: number of seeds of matching for each combination (default {_D.seeds})
  --max-concurrent N: largest number of trials at a time; 0: as many as fit (default 0)
  --time-budget TIME: stop trials after so many seconds, or 30m, 2h; continue with --resume (default: no limit)
  --final-seeds N: new seeds with which best and defaults are retrained and measured on test; 0: none (default {_D.final_seeds}; grid: 0)
what is searched, and how
  --space FILE: YAML file that changes the space, or names all of a grid; --print-space prints one (default: as printed)
  --print-space: print the space as YAML and exit
  --algorithm NAME: which settings come next: random; optuna: its TPE sampler; grid: each combination of choices (default {_D.algorithm})
  --scheduler NAME: asha: stop trials with low accuracy early; fifo: run all trials to the end (default {_D.scheduler}; grid: fifo)
  --metric NAME: how trials are compared; val: {METRICS["val"]}, in percent; lower: {METRICS["lower"]} (default {_D.metric})
what a trial gets
  --ranks-per-trial N: ranks per trial, which may span nodes (default {_D.ranks_per_trial})
  --cpus-per-trial N: CPU cores per rank (default {_D.cpus_per_trial:g})
  --gpus-per-trial N: GPUs per rank; 0.5: two trials share a GPU (default: 1 if the cluster has GPUs, else 0)
"""
"""Groups of options; the types of their values are those of `Options`."""


def parser() -> argparse.ArgumentParser:
    """Return the parser of the options, in groups; an option that is not given is None."""
    p = Parser(
        prog="python tune/search.py",
        example="python tune/search.py --data data/mine --out runs/mine-search --trials 40",
        usage="%(prog)s [--data DIR] [--out DIR] [--trials N] [OPTION VALUE ...] [--SECTION.NAME VALUE ...]",
        allow_abbrev=False,
        description="Search temperature, loss weights and learning rate of matching. Shards, teachers, logits and GAN are computed once; "
        "a trial is one run of the matching step, measured by quick students on val. Ends with a table, best.yaml and search.md.",
        epilog="Any setting of gdd_dist.train may be given too (--matching.steps 1000, --store DIR, --seed 1 …) and holds for all trials; "
        "python -m gdd_dist.train --help lists them. "
        f"Without any of them, digits in minutes: {SMALL[1]} steps of matching a trial, measured every {SMALL[3]}.",
    )
    types: dict[str, Any] = get_type_hints(Options)
    group: Any = p
    for line in _HELP.strip().splitlines():
        names, colon, text = line.strip().partition(": ")
        flag, _, metavar = names.partition(" ")
        if not colon:
            group = p.add_argument_group(line)
        elif metavar:
            hint = types.get(flag[2:].replace("-", "_"), str)
            kind = _seconds if metavar == "TIME" else next(iter(get_args(hint)), hint)  # X of X | None
            group.add_argument(flag, type=kind, metavar=metavar, help=text)
        else:
            group.add_argument(flag, action="store_true", help=text)
    p.set_defaults(out="runs/search")
    return p


def _seconds(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text} is not a time; give seconds, or 30m, or 2h")
    return float(found[1]) * _UNITS[found[2]]


def options_of(typed: Mapping[str, Any], before: Options | None = None) -> Options:
    """Return the ``typed`` options over the defaults, or over ``before``. Raises UserError for options that no cluster could fulfil."""
    grid = (before.algorithm if before else typed.get("algorithm")) == GRID
    found = dataclasses.replace(before or Options(**(OF_GRID if grid else {})), **typed)
    check_options(found)
    if not grid and "seeds" in typed:
        raise UserError("--seeds is for a grid; add --algorithm grid with a --space FILE, or leave it out")
    if grid and "trials" in typed:
        raise UserError("a grid has as many trials as combinations times --seeds; leave out --trials")
    if grid and found.scheduler != OF_GRID["scheduler"]:
        raise UserError(f"--scheduler {found.scheduler} stops trials that a grid compares; leave it out")
    return found


def check_options(o: Options) -> None:
    """Raise UserError for the first option that makes no sense by itself."""
    known: dict[str, tuple[Any, ...]] = {"scheduler": SCHEDULERS, "algorithm": ALGORITHMS, "metric": tuple(METRICS)}
    for name, choices in known.items():
        if getattr(o, name) not in choices:
            raise UserError(f"--{name} {getattr(o, name)} is not known; choose {' or '.join(choices)}")
    for name, low in (("trials", 1), ("seeds", 1), ("max_concurrent", 0), ("ranks_per_trial", 1), ("final_seeds", 0)):
        if getattr(o, name) < low:
            raise UserError(f"--{name.replace('_', '-')} {getattr(o, name)} is too small; give at least {low}")
        if getattr(o, name) > MOST:
            raise UserError(f"--{name.replace('_', '-')} {getattr(o, name)} is too large; give at most {MOST}")
    if o.time_budget is not None and o.time_budget <= 0:
        raise UserError("--time-budget must be more than 0 seconds; raise it")
    if not 0 < o.cpus_per_trial < float("inf"):
        raise UserError(f"--cpus-per-trial {o.cpus_per_trial:g} is too small; give more than 0")
    if o.gpus_per_trial is not None and not 0 <= o.gpus_per_trial < float("inf"):
        raise UserError(f"--gpus-per-trial {o.gpus_per_trial:g} is too small; give at least 0")
    if o.ranks_per_trial > 1 and o.gpus_per_trial is not None and 0 < o.gpus_per_trial < 1:
        raise UserError("the ranks of a trial cannot share a GPU; give --gpus-per-trial 1, or --ranks-per-trial 1")
