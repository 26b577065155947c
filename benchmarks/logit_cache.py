"""Cached logits against teachers who answer real images anew at every step, and after how many runs the cache has paid for itself.

    python benchmarks/logit_cache.py [--presets cifar10 digits] [--architectures convnet resnet18] [--rounds 3] [-- trainer settings]

For each preset and each architecture of its pool, both sides in turn, round after round, one thread:

    logit_cache/step         the trainer's matching step, with generator, discriminator and reading
    logit_cache/answers      a step without them: both answers to 64 images, the loss, and its gradient in the images
    logit_cache/break-even   of the preset: forwards that fill the cache over those of one run without it, by number and by time

The second costs a forward and a gradient with the cache, and one more forward without, so it is at most about 1.5 times as fast. Time for a
forward that fills the cache is the logits step's own, in its batches; that of one without the cache is what `answers` takes longer. Networks
are random, and the images made up but for the digits. Figures are of the process's own CPU time; `wall` has the same by the clock.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import line, machine, rates, rounded, versions
from made_up import before_matching, jpegs, matching_step
from torch import Tensor

from gdd_dist.config.command_line import parse
from gdd_dist.config.settings import Config
from gdd_dist.data.augment import AUGMENT_DRAWS
from gdd_dist.data.images import to_float
from gdd_dist.data.noise import uniform
from gdd_dist.dry_run.trial import Trial
from gdd_dist.models.files import read_teachers
from gdd_dist.runtime.versions import commit
from gdd_dist.steps import logits
from gdd_dist.steps.matching_groups import Groups
from gdd_dist.steps.matching_pool import Pool
from gdd_dist.training import losses
from gdd_dist.training.adversaries import image_gradient
from sharding import build_digits
from sharding.manifest import Manifest
from sharding.options import DEFAULT_VAL_FRACTION

SIDES = ("cached", "anew")
CIFAR10_TRAIN = round(50_000 * (1 - DEFAULT_VAL_FRACTION))
UNIT = "images/min of CPU time"


class Anew(Pool):
    """Teachers who answer the real side of each pair when it is asked for: what the cache holds, up to its rounding to float16."""

    @torch.no_grad()
    def real_logits(self, groups: Groups) -> Tensor:
        ctx, draws = self._ctx, np.empty((len(groups.slots), AUGMENT_DRAWS), np.float32)
        for view in np.unique(groups.views):
            here = groups.views == view
            draws[here] = logits.view_draws(ctx.config.step_seed("logits"), int(view), groups.samples[here])
        images = to_float(ctx.images("train").read(groups.samples), ctx.device)
        labels, plain = torch.from_numpy(groups.labels), torch.from_numpy(groups.views == 0)
        return self.answer(images, labels, groups, torch.from_numpy(draws), plain)[0]


def pools(trial: Trial) -> dict[str, Pool]:
    """The same teachers, with the cache and without."""
    dirs = trial.directories
    return {side: of(trial.ctx, dirs["teachers"], dirs["logits"]) for side, of in zip(SIDES, (Pool, Anew), strict=True)}


def answers(trial: Trial, pool: Pool) -> Callable[[], None]:
    """The same without generator and discriminator: of images that are there."""
    ctx, m, numbers = trial.ctx, trial.ctx.config.matching, itertools.count(1)
    images = torch.rand(m.batch, ctx.manifest.channels, ctx.manifest.height, ctx.manifest.width) * 2 - 1

    def step() -> None:
        number = next(numbers)
        groups = pool.dealer.batch(number).by_teacher()
        real, plain = pool.real_logits(groups), torch.from_numpy(groups.views == 0)
        labels = torch.from_numpy(groups.labels)
        draws = torch.from_numpy(uniform(0, "benchmark", number, groups.slots, AUGMENT_DRAWS))

        def loss(fake: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            found, _ = pool.answer(fake, labels, groups, draws, plain)
            return losses.PAIR[m.loss](real, found, m.temperature), {}

        image_gradient(loss, images)

    return step


def filling(trial: Trial) -> tuple[Callable[[], object], int]:
    """What the logits step does for one teacher and one shard, and how many forwards that is."""
    ctx = trial.ctx
    net = ctx.teacher(read_teachers(trial.directories["teachers"])[0])
    return lambda: logits.answer(ctx, net, 0, lambda _: None), ctx.config.logits.views * trial.shards[0]


def forwards(config: Config, train: int) -> tuple[int, int]:
    """Forwards of real images through teachers: those that fill the cache of ``train`` images, and those of one run without it."""
    t, m = config.teachers, config.matching
    return len(t.architectures) * t.seeds * t.snapshots * train * config.logits.views, m.steps * m.batch


@dataclass
class Measured:
    """Of one architecture: images a minute of each kind and side, [rounds, clocks]; and forwards that fill the cache, the same."""

    kinds: dict[str, dict[str, np.ndarray]]
    filling: np.ndarray

    @property
    def seconds(self) -> np.ndarray:
        """CPU seconds of a forward that fills the cache, and what a forward without it makes a step longer by: [2, rounds]."""
        cached, anew = (60 / self.kinds["answers"][side][:, 0] for side in SIDES)
        return np.stack((60 / self.filling[:, 0], anew - cached))


def measure(trial: Trial, rounds: int, seconds: float) -> Measured:
    """All of it, in turn."""
    batch, found = trial.ctx.config.matching.batch, pools(trial)
    kinds = {"step": matching_step, "answers": answers}
    steps = {(kind, side): (make(trial, found[side]), batch) for kind, make in kinds.items() for side in SIDES}
    steps["filling", ""] = filling(trial)
    for step, _ in steps.values():
        step()  # the first call costs more
    turns = [{key: rates(step, images, seconds) for key, (step, images) in steps.items()} for _ in range(rounds)]
    by = {key: np.array([turn[key] for turn in turns]) for key in steps}
    return Measured({kind: {side: by[kind, side] for side in SIDES} for kind in kinds}, by["filling", ""])


def lines(found: Measured, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The JSON lines of one architecture."""
    texts = []
    for kind, sides in found.kinds.items():
        (cached, wall), (anew, anew_wall) = (sides[side].T for side in SIDES)
        medians = {"ours": np.median(wall), "anew": np.median(anew_wall), "ratio": np.median(wall / anew_wall)}
        text = line(f"logit_cache/{kind}", cached, {"anew": anew}, UNIT, settings)
        texts.append({**text, "wall": rounded(medians)})
    return texts


def break_even(config: Config, train: int, found: dict[str, Measured], settings: dict[str, Any]) -> dict[str, Any]:
    """The JSON line of a preset. Each architecture counts alike: the pool has as many teachers of each."""
    cache, run = forwards(config, train)
    filling, anew = np.mean([one.seconds for one in found.values()], 0)
    by_time = cache * filling / (run * anew)
    milliseconds = {name: np.median(1000 * one.seconds, 1).round(2).tolist() for name, one in found.items()}
    return {
        "benchmark": "logit_cache/break-even",
        "forwards": {"cache": cache, "run": run},
        "milliseconds": {name: dict(zip(("cache", "run"), both, strict=True)) for name, both in milliseconds.items()},
        "runs": {"by forwards": round(cache / run, 2), "by time": round(float(np.median(by_time)), 2)},
        "by_time": by_time.round(2).tolist(),
        "settings": {**settings, "train": train},
        "machine": machine(),
        "versions": versions("torch", "numpy"),
        "commit": commit(),
    }


def compare(preset: str, scratch: Path, args: argparse.Namespace) -> None:
    """Measure a preset and print its lines."""
    if preset == "digits":
        data = scratch / "data"
        build_digits(data)
        train = Manifest.load(data).splits["train"].samples
    else:
        data, train = jpegs(scratch, args.images, 32), CIFAR10_TRAIN
    own, measured = ["--preset", preset, *args.settings], dict[str, Measured]()
    config = parse(own).config
    settings = {"preset": preset, "batch": args.batch, "images": args.images, "threads": 1, "trainer": args.settings}
    for name in args.architectures or config.teachers.architectures:
        one = ["--teachers.architectures", name, "--matching.batch", str(args.batch)]
        trial = before_matching(scratch / name, data, [*own, *one])
        measured[name] = measure(trial, args.rounds, args.seconds)
        for text in lines(measured[name], {**settings, "teachers": name}):
            print(json.dumps(text), flush=True)
    print(json.dumps(break_even(config, train, measured, settings)), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["cifar10", "digits"], help="of CIFAR-10 or the digits")
    parser.add_argument("--architectures", nargs="+", help="of the teachers (default: the preset's)")
    parser.add_argument("--rounds", type=int, default=3, help="default 3")
    parser.add_argument("--seconds", type=float, default=5.0, help="CPU time of a side in a round, at least a step")
    parser.add_argument("--batch", type=int, default=64, help="images of a measured step (default 64)")
    parser.add_argument("--images", type=int, default=300, help="images of the made-up data set (default 300)")
    parser.add_argument("settings", nargs="*", help="settings of gdd_dist.train, after --")
    args = parser.parse_args()
    for preset in args.presets:
        with tempfile.TemporaryDirectory(prefix="gdd-logit-cache-") as scratch:
            compare(preset, Path(scratch), args)


if __name__ == "__main__":
    main()
