"""The program that measures a finished run's generator at any budget: python -m gdd_dist.evaluate OUT --ipc 1 10 50."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gdd_dist.config.settings import Config
from gdd_dist.pipeline.finished_run import opened, settings_of
from gdd_dist.reporting.tables import table
from gdd_dist.runtime.arguments import Parser
from gdd_dist.runtime.run_program import note_preemption, run_program
from gdd_dist.storage.json_files import write_json

if TYPE_CHECKING:  # a command line is read, and refused, without torch
    from gdd_dist.evaluation.rows import Row
    from gdd_dist.runtime.world import World
    from gdd_dist.training.context import Context

FILE = "evaluate.json"
_LISTS = ("ipc", "protocol", "labels", "students", "baselines")
_NUMBERS = ("seeds", "epochs")


def parser() -> argparse.ArgumentParser:
    """Return the parser. Settings that are not given keep the run's values."""
    p = Parser(
        allow_abbrev=False,
        prog="python -m gdd_dist.evaluate",
        example="python -m gdd_dist.evaluate runs/digits --ipc 1 10 --students convnet resnet10 --seeds 3",
        description="Train students on images drawn by a finished run's generator and on the baselines; print the table and write "
        f"OUT/{FILE}. Students trained earlier by a report or by this program are reused. Works with or without torchrun.",
    )
    same = "default: the value of the run"
    p.add_argument("out", metavar="OUT", help="run directory of gdd_dist.train")
    p.add_argument("--ipc", nargs="+", metavar="N", help=f"images per class, one or several; {same}")
    p.add_argument(
        "--protocol",
        nargs="+",
        metavar="NAME",
        help=f"regenerate: a fresh set each epoch; fixed: one set drawn once; {same}",
    )
    p.add_argument(
        "--labels", nargs="+", metavar="NAME", help=f"hard: the class; soft: mean of the teachers' softmax; {same}"
    )
    p.add_argument("--students", nargs="+", metavar="NAME", help=f"classifiers, NAME or NAME:WIDTH; {same}")
    p.add_argument("--seeds", metavar="N", help=f"students per row; {same}")
    p.add_argument(
        "--baselines",
        nargs="+",
        metavar="NAME",
        help=f"baseline rows: real, equal_bytes, gaussian, gan, full; {same}",
    )
    p.add_argument("--epochs", metavar="N", help=f"epochs of a student, each of IPC images per class; {same}")
    p.add_argument("--data", metavar="DIR", help="the data set, if it was moved since the run")
    p.add_argument(
        "--device", default="auto", metavar="NAME", help="auto, cpu or cuda; default: auto, CUDA if there is a GPU"
    )
    p.add_argument("--no-verify", action="store_true", help="do not hash the files that will be read")
    p.add_argument("--debug", action="store_true", help="show tracebacks")
    return p


def settings(arguments: argparse.Namespace) -> Config:
    """Return the run's settings, overridden by the command line. Raises UserError for a directory that is not a run."""
    given = ["--device", arguments.device, "--verify", "true"]
    for name in (*_LISTS, *_NUMBERS):
        value = getattr(arguments, name)
        if value is not None:
            given += [f"--report.{name}", *([value] if isinstance(value, str) else value)]
    given += ["--data", arguments.data] if arguments.data else []
    given += ["--no-verify"] if arguments.no_verify else []
    return settings_of(Path(arguments.out), *given)


def main(argv: Sequence[str], joined: Callable[[World], None]) -> None:
    """Measure, print, write OUT/evaluate.json."""
    config = settings(parser().parse_args(argv))
    out = Path(config.out or ".")
    from gdd_dist.evaluation.rows import plan
    from gdd_dist.pipeline.verify_inputs import verify_inputs

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
    results = measure(ctx, rows, dirs, fps)
    if world.is_main:
        from gdd_dist.evaluation.quick_students import Candidates
        from gdd_dist.models.files import GENERATOR, read_network
        from gdd_dist.reporting.metrics import document

        candidates = Candidates.of(read_network(dirs["matching"] / GENERATOR)[1])
        write_json(out / FILE, document(ctx, fps, candidates, results))
        sys.stdout.write(f"\n{table(results)}\n\nwritten: {out / FILE}\n")


def measure(ctx: Context, rows: Sequence[Row], dirs: dict[str, Path], fps: dict[str, str]) -> list[dict[str, Any]]:
    """Measure all rows, with progress lines."""
    from gdd_dist.evaluation.student_results import evaluate, log_accuracies

    monitor = ctx.monitor("evaluate", Path("students"), len(rows) * ctx.config.report.seeds, unit="student")
    results = evaluate(ctx, dirs, fps, monitor)
    log_accuracies(monitor, results)
    monitor.close()
    return results


if __name__ == "__main__":
    run_program(main, sys.argv[1:])
