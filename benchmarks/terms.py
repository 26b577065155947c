"""What each term of matching does to the Gaussians: students of two budgets, for each set of terms, on the artifacts of finished runs.

    python benchmarks/terms.py runs/0 runs/1 runs/2 [--budgets 300x20 500x64] [--students 3] [--arms FILE] > benchmarks/results/terms.jsonl

Each set of terms moves the Gaussians of each run for as many steps as --matching.steps says, from the same latents. The rows beside them
are real images and the Gaussians before. A JSON line for each run, set of terms and budget: test accuracies of the students, in percent.
Students of one number share first weights, labels, latents and augmentation in all rows. Nothing is chosen on test here.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from gaussian import Row, Study, Trained

from gdd_dist.config.command_line import settings_of
from gdd_dist.config.steps import Inputs
from gdd_dist.dry_run.trial import SILENT
from gdd_dist.models.files import GENERATOR, load_generator_network
from gdd_dist.models.gaussian import LinearGenerator
from gdd_dist.pipeline.finished_run import opened
from gdd_dist.steps.matching import Matching, Pool
from gdd_dist.training.context import Context

TERMS = ("pair", "mean", "label", "feature")
ARMS: dict[str, dict[str, float]] = {
    "label, feature": {"label": 0.05, "feature": 1.0},
    "label": {"label": 0.05},
    "feature": {"feature": 1.0},
    "label, mean": {"label": 0.05, "mean": 0.1},
    "pair, mean": {"pair": 1.0, "mean": 0.1},
    "pair, label, feature": {"pair": 1.0, "label": 0.05, "feature": 1.0},
}
"""Name → weights λ of the terms; the others are 0. pair: standardized (skd)."""
STEPS = ("teachers", "logits", "gaussian", "gan")


def moved(out: Path, weights: dict[str, float], given: list[str]) -> tuple[LinearGenerator, float]:
    """The Gaussians of the run ``out``, moved by these terms, and the seconds that took."""
    argv = [f"--matching.lambda_{term}={weights.get(term, 0.0)}" for term in TERMS]
    config = settings_of(out, *given, *argv, "--matching.start=gaussian", "--matching.lambda_adv=0")
    ctx, fps, dirs = opened(out, config, STEPS, lambda world: None)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as work:
        trained = _trained(ctx, Inputs(dirs, fps, {}), Path(work))
        net: LinearGenerator = trained.nets.ema.folded()  # type: ignore[operator]
        trained.close()
    return net, time.perf_counter() - begin


def _trained(ctx: Context, inputs: Inputs, work: Path) -> Matching:
    pool = Pool(ctx, inputs.directories["teachers"], inputs.directories["logits"])
    pool.look()
    trainee = Matching(ctx, work, pool, inputs)
    trainee.monitor = SILENT
    for step in range(trainee.steps):
        trainee.train(step, trainee.read(step))
    return trainee


def before(out: Path) -> Iterator[tuple[str, LinearGenerator | None]]:
    """(row, generator or None for real images) of what matching starts from."""
    yield "real", None
    net = load_generator_network(out / "gaussian" / "latest" / GENERATOR)[0]
    assert isinstance(net, LinearGenerator)
    yield "gaussian", net


def studies(args: argparse.Namespace, out: Path) -> dict[str, Study]:
    """Budget → its protocol, on the data of a run."""
    config, found = settings_of(out), {}
    for budget in args.budgets:
        steps, batch = map(int, budget.split("x"))
        protocol = argparse.Namespace(
            data=Path(str(config.data)),
            components=[max(config.gaussian.components)],
            students=args.students,
            first=0,
            student=args.student,
            steps=steps,
            batch=batch,
            precision=args.precision,
            every=args.every,
            flip=config.loader.flip,
        )
        found[budget] = Study(protocol)
    return found


def judge(
    of: dict[str, Study], name: str, net: LinearGenerator | None, settings: dict[str, Any], about: dict[str, Any]
) -> None:
    """Train the students of a row and print a JSON line for each budget."""
    for budget, study in of.items():
        draw = study.real if net is None else partial(study.drawn, net)
        trained = Trained(study, Row(name, settings, None, draw, True), "test")
        print(json.dumps({**trained.line(), **about, "budget": budget}), flush=True)


def parser(doc: str) -> argparse.ArgumentParser:
    """What says which students judge."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("runs", type=Path, nargs="+", help="finished runs of gdd_dist.train")
    made.add_argument("--budgets", nargs="+", default=["300x20", "500x64"], help="steps × images of a student")
    made.add_argument("--students", type=int, default=3, help="of each row, 2 or more (default %(default)s)")
    made.add_argument("--student", default="convnet:32", help="architecture (default %(default)s)")
    made.add_argument("--precision", choices=("float32", "bf16"), default="bf16")
    made.add_argument("--every", type=int, default=2, help="which images of test are measured (default each 2nd)")
    return made


def main() -> None:
    asked = parser(__doc__ or "")
    asked.add_argument("--arms", type=Path, help="JSON file in place of the built-in sets of terms: name → weights")
    args, given = asked.parse_known_args()
    arms = json.loads(args.arms.read_text()) if args.arms else ARMS
    for out in args.runs:
        of, about = studies(args, out), {"benchmark": "terms", "run": out.name}
        for name, net in before(out):
            judge(of, name, net, {}, {**about, "moving": 0.0})
        for name, weights in arms.items():
            net, seconds = moved(out, weights, given)
            judge(of, name, net, dict(weights), {**about, "moving": round(seconds, 1)})


if __name__ == "__main__":
    main()
