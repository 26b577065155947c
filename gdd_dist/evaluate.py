"""The program that measures a finished run's generator at any budget: python -m gdd_dist.evaluate OUT --ipc 1 10 50."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args, get_origin

from gdd_dist.config.bounds import options
from gdd_dist.config.command_line import settings_of
from gdd_dist.config.settings import Config
from gdd_dist.pipeline.finished_run import opened
from gdd_dist.reporting.tables import table
from gdd_dist.runtime.arguments import Parser
from gdd_dist.runtime.run_program import note_preemption, run_program
from gdd_dist.runtime.signals import asked
from gdd_dist.storage.json_files import write_json

if TYPE_CHECKING:  # a command line is read, and refused, without torch
    from gdd_dist.runtime.world import World

FILE = "evaluate.json"
_ASKED = ("ipc", "protocol", "labels", "students", "seeds", "baselines", "epochs")
"""The settings of the report that this program takes, too."""


def parser() -> argparse.ArgumentParser:
    """Return the parser. Settings that are not given keep the run's values."""
    p = Parser(
        allow_abbrev=False,
        prog="python -m gdd_dist.evaluate",
        example="python -m gdd_dist.evaluate runs/digits --ipc 1 10 --students convnet resnet10 --seeds 3",
        description="Train students on images drawn by a finished run's generator and on the baselines; print the table and write "
        f"OUT/{FILE}. Students trained earlier by a report or by this program are reused. Works with or without torchrun.",
    )
    p.add_argument("out", metavar="OUT", help="run directory of gdd_dist.train")
    for name, kind, field in options():
        section, _, leaf = name.rpartition(".")
        if section == "report" and leaf in _ASKED:
            many, metavar = get_origin(kind) is tuple, "N" if int in (kind, *get_args(kind)) else "NAME"
            said = f"{field.metadata['help']}; default: the value of the run"
            p.add_argument(f"--{leaf}", dest=name, nargs="+" if many else None, metavar=metavar, help=said)
    p.add_argument("--data", metavar="DIR", help="the data set, if it was moved since the run")
    text = "auto, cpu or cuda; default: auto, CUDA if there is a GPU"
    p.add_argument("--device", default="auto", metavar="NAME", help=text)
    p.add_argument("--no-verify", action="store_true", help="do not hash the files that will be read")
    p.add_argument("--debug", action="store_true", help="show tracebacks")
    return p


def settings(arguments: argparse.Namespace) -> Config:
    """Return the run's settings, overridden by the command line. Raises UserError for a directory that is not a run."""
    given = ["--device", arguments.device, "--verify", str(not arguments.no_verify).lower()]
    for name, value in vars(arguments).items():
        if name.startswith("report.") and value is not None:
            given += [f"--{name}", *([value] if isinstance(value, str) else value)]
    given += ["--data", arguments.data] if arguments.data else []
    return settings_of(Path(arguments.out), *given)


def main(argv: Sequence[str], joined: Callable[[World], None]) -> None:
    """Measure, print, write OUT/evaluate.json."""
    asked.among_ranks = True
    config = settings(parser().parse_args(argv))
    out = Path(config.out or ".")
    from gdd_dist.evaluation.rows import plan
    from gdd_dist.evaluation.student_results import evaluate, log_accuracies
    from gdd_dist.pipeline.preflight import verify_inputs

    def begun(world: World) -> None:
        joined(world)
        note_preemption(world, out)

    rows = plan(config)
    ctx, fps, dirs = opened(out, config, {step for row in rows for step in row.reads}, begun)
    world = ctx.world
    world.enter("verify")
    if config.verify:
        verify_inputs(ctx, {step: fps[step] for step in dirs}, ("train", "test"))
    world.enter("evaluate")
    monitor = ctx.monitor("evaluate", Path("students"), len(rows) * config.report.seeds, unit="student")
    results = evaluate(ctx, dirs, fps, monitor)
    log_accuracies(monitor, results)
    monitor.close()
    if world.is_main:
        from gdd_dist.evaluation.quick_students import Candidates
        from gdd_dist.reporting.metrics import document

        write_json(out / FILE, document(ctx, fps, Candidates.read(dirs["matching"]), results))
        sys.stdout.write(f"\n{table(results)}\n\nwritten: {out / FILE}\n")


if __name__ == "__main__":
    run_program(main, sys.argv[1:])
