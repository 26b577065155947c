"""Our matching step against DiM's, by classifier: the same images, the same batch, one thread each, in turn, round after round.

    python benchmarks/matching_step.py [--classifiers convnet resnet18_bn:32 resnet18] [--presets cifar10-cpu cifar10] [--rounds 3]

Ours is the trainer's own step, reading included, with the networks and the pool of teachers of each preset, all of one architecture;
theirs is benchmarks/dim.py. ``resnet18_bn:32`` is DiM's own ResNet-18 for CIFAR, `resnet18` the one that our presets have. All networks are
random and the images of 32 pixels made up: no number that a step computes changes what it costs. Prints one JSON line for each preset and
classifier. The machine may be busy: figures are images a minute of the process's own CPU time; `wall` has the same by the clock,
and `gflop_an_image` what both compute, counted.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import line, rates, rounded
from dim import SIDE, Batch, DiM
from made_up import before_matching, jpegs, matching_step
from projection import Counter

from gdd_dist.data.images import to_float
from gdd_dist.steps.matching_pool import Pool
from gdd_dist.training.context import Context

Step = Callable[[], object]


def theirs(ctx: Context, classifier: str, batch: int, args: argparse.Namespace) -> Step:
    """A step of DiM. All images are in memory, as floats, before it begins."""
    images = ctx.images("train")
    pixels, labels = to_float(images.read(np.arange(len(images))), ctx.device), torch.from_numpy(images.labels)

    def following() -> Batch:
        rows = torch.randint(len(labels), (batch,))
        return pixels[rows], labels[rows]

    net = ctx.classifier(classifier, 0, "benchmark").train()
    return DiM(net, ctx.classes, following, width=args.dim_width, iterations=args.iterations).step


def gflop(step: Step, images: int) -> float:
    """Billions of floating-point operations of matrix products and convolutions, for each of a step's images."""
    with Counter() as counter:
        step()
    return counter.flops / images / 1e9


def compare(folder: Path, data: Path, classifier: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The JSON lines of a classifier, one for each preset; DiM's step is measured once a round for all."""
    own = ["--teachers.architectures", classifier, "--matching.batch", str(args.batch), *args.settings]
    trials = {name: before_matching(folder / name, data, ["--preset", name, *own]) for name in args.presets}
    steps: dict[str, Step] = {}
    for name, trial in trials.items():
        pool = Pool(trial.ctx, trial.directories["teachers"], trial.directories["logits"])
        steps[name] = matching_step(trial, pool)
    ctx = next(iter(trials.values())).ctx
    steps["DiM"] = theirs(ctx, classifier, args.batch, args)
    # These calls warm up, too. One as long as DiM's needs none: the count is of a few images.
    work = {name: gflop(steps[name], args.batch) for name in args.presets}
    work["DiM"] = gflop(theirs(ctx, classifier, 4, args), 4)
    found = [{name: rates(step, args.batch, args.seconds) for name, step in steps.items()} for _ in range(args.rounds)]
    by = {name: np.array([one[name] for one in found]) for name in steps}  # name → [rounds, clocks]
    about = {"classifier": classifier, "batch": args.batch, "size": SIDE, "threads": 1, "trainer": args.settings}
    about |= {"DiM": {"width": args.dim_width, "iterations": args.iterations}}
    lines = []
    for name in args.presets:
        (cpu, wall), (cpu_dim, wall_dim) = by[name].T, by["DiM"].T
        own_pool = {"preset": name, "teachers": len(trials[name].pool)}
        text = line(f"matching_step/{name}", cpu, {"DiM": cpu_dim}, "images/min of CPU time", {**about, **own_pool})
        medians = {"ours": np.median(wall), "DiM": np.median(wall_dim), "ratio": np.median(wall / wall_dim)}
        counted = {"ours": work[name], "DiM": work["DiM"], "ratio": work["DiM"] / work[name]}
        further = {"wall": medians, "gflop_an_image": counted}
        lines.append({**text, **{name: rounded(values) for name, values in further.items()}})
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classifiers", nargs="+", default=["convnet", "resnet18_bn:32", "resnet18"])
    parser.add_argument("--presets", nargs="+", default=["cifar10-cpu", "cifar10"], help="whose networks are ours")
    parser.add_argument("--rounds", type=int, default=3, help="default 3")
    parser.add_argument("--seconds", type=float, default=10.0, help="CPU time of a side in a round, at least a step")
    parser.add_argument("--batch", type=int, default=64, help="images of a step, both sides (default 64)")
    parser.add_argument("--images", type=int, default=600, help="images of the data set (default 600)")
    parser.add_argument("--iterations", type=int, default=16, help="DiM: iterations of the classifier (default 16)")
    parser.add_argument("--dim-width", type=int, default=196, help="DiM: channels of both GAN networks (default 196)")
    parser.add_argument("settings", nargs="*", help="settings of gdd_dist.train, after --")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gdd-matching-step-") as scratch:
        data = jpegs(Path(scratch), args.images, SIDE)
        for classifier in args.classifiers:
            for text in compare(Path(scratch, classifier), data, classifier, args):
                print(json.dumps(text), flush=True)


if __name__ == "__main__":
    main()
