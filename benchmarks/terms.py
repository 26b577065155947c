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


def generators(
    out: Path, arms: dict[str, dict[str, float]], given: list[str]
) -> Iterator[tuple[str, LinearGenerator | None, float]]:
    """(row, generator or None for real images, seconds of moving): the Gaussians of the run, and as each set of terms moved them."""
    yield "real", None, 0.0
    net = load_generator_network(out / "gaussian" / "latest" / GENERATOR)[0]
    assert isinstance(net, LinearGenerator)
    yield "gaussian", net, 0.0
    for name, weights in arms.items():
        yield name, *moved(out, weights, given)


def study_of(args: argparse.Namespace, out: Path, steps: int, batch: int) -> Study:
    """The protocol of one budget."""
    config = settings_of(out)
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
    return Study(protocol)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="finished runs of gdd_dist.train")
    parser.add_argument("--budgets", nargs="+", default=["300x20", "500x64"], help="steps × images of a student")
    parser.add_argument("--students", type=int, default=3, help="of each row, 2 or more (default %(default)s)")
    parser.add_argument("--student", default="convnet:32", help="architecture (default %(default)s)")
    parser.add_argument("--precision", choices=("float32", "bf16"), default="bf16")
    parser.add_argument("--every", type=int, default=2, help="which images of test are measured (default each 2nd)")
    parser.add_argument("--arms", type=Path, help="JSON file in place of the built-in sets of terms: name → weights")
    args, given = parser.parse_known_args()
    arms = json.loads(args.arms.read_text()) if args.arms else ARMS
    for out in args.runs:
        studies = {b: study_of(args, out, *map(int, b.split("x"))) for b in args.budgets}
        for name, net, seconds in generators(out, arms, given):
            for budget, study in studies.items():
                draw = study.real if net is None else partial(study.drawn, net)
                trained = Trained(study, Row(name, dict(arms.get(name, {})), None, draw, True), "test")
                about = {"benchmark": "terms", "run": out.name, "budget": budget, "moving": round(seconds, 1)}
                print(json.dumps({**trained.line(), **about}), flush=True)


if __name__ == "__main__":
    main()
