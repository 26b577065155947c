"""The gan and matching steps by ranks: this checkout against another, and against a bare DDP step, in one run.

    python benchmarks/steps.py --baseline DIR [--ranks 1 2 8] [--rounds 3] [--sizes digits cifar10-trial]

Both checkouts run gdd_dist.train under torchrun in turn, round after round, with the settings of the digits preset and of an earlier
trial on CIFAR-10 (on made-up images). What is timed are steps 20 to 40, by the clock of rank 0. `bare` are as many steps that follow in
the same processes on one fixed batch: the same networks, losses, augmentation, running mean and Adam behind torch's DDP, without reading,
draws, vote, skipped steps, logs. Prints a JSON line for each size, step and number of ranks: images/s; `ratio` is over the baseline.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

ROOT = Path(__file__).resolve().parents[1]
STEP_NAMES = ("gan", "matching")
WARM, TIMED = 20, 20
STEPS = WARM + TIMED + 2
BATCH = 64
SHORT = (
    f"--precision float32 --checkpoint_seconds 1000000 --teachers.seeds 1 --teachers.snapshots 2 --teachers.epochs 2 --logits.views 2 "
    f"--gan.batch {BATCH} --gan.steps {STEPS} --matching.batch {BATCH} --matching.steps {STEPS} --matching.interval {STEPS} "
    "--matching.quick_students 1 --matching.quick_steps 1 --until matching"
)
SIZES = {
    "digits": "--preset digits",
    "cifar10-trial": "--preset cifar10 --teachers.architectures convnet:32 --teachers.batch 128 --gan.width 64 --gan.d_width 64 "
    "--gan.blocks 1 --gan.d_blocks 1 --gan.patch 2 --gan.augment none --matching.lambda_adv 1.0",
}


class Bare:
    """A DDPEngine's network and optimizer without what it adds to them."""

    def __init__(self, engine: Any) -> None:
        self._engine, self._optimizer = engine, engine._optimizer

    def __call__(self, *inputs: Tensor) -> Tensor:
        out: Tensor = self._engine._wrapped(*inputs)
        return out

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, lr: float) -> Tensor:
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return torch.ones((), dtype=torch.bool)

    def gathered(self) -> Any:
        return self._engine.gathered()


def watch(results: Path) -> None:
    """In a rank of this checkout: bare steps follow the timed ones; rank 0 writes their seconds."""
    from gdd_dist.training import loop

    class Watcher(loop.Watcher):
        def batches(self, trainee: Any, start: int, batches: Iterator[Any]) -> Iterator[Any]:
            return self._followed(trainee, batches) if trainee.name in STEP_NAMES else batches

        def _followed(self, trainee: Any, batches: Iterator[Any]) -> Iterator[Any]:
            for number, batch in enumerate(batches):
                yield batch
                if number == WARM + TIMED - 1:
                    seconds = self._bare(trainee, batch)
                    if trainee._ctx.world.is_main:
                        (results / f"bare-{trainee.name}.json").write_text(json.dumps(seconds))

        def _bare(self, trainee: Any, batch: Any) -> float:
            nets = trainee.nets
            kept, nets.g, nets.d = (nets.g, nets.d), Bare(nets.g), Bare(nets.d)
            trainee.train(WARM, batch)
            trainee._ctx.world.barrier()
            begin = time.perf_counter()
            for _ in range(TIMED):
                trainee.train(WARM, batch)
            seconds = time.perf_counter() - begin
            nets.g, nets.d = kept
            return seconds / TIMED

    loop.watchers.append(Watcher())


def rank(results: Path, bare: bool) -> None:
    """A rank of gdd_dist.train, of the checkout on the path. Rank 0 notes when Adam moved each network."""
    moved: dict[torch.optim.Optimizer, list[float]] = {}

    def note(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if not isinstance(optimizer, torch.optim.Adam):
            return
        times = moved.setdefault(optimizer, [])
        times.append(time.perf_counter())
        if len(times) == WARM + TIMED + 1:  # the program ends without Python's own shutdown
            (results / "moved.json").write_text(json.dumps(list(moved.values())))

    if os.environ.get("RANK", "0") == "0":
        register_optimizer_step_post_hook(note)
    if bare:
        watch(results)
    runpy.run_module("gdd_dist.train", run_name="__main__", alter_sys=True)


def measure(checkout: Path, ranks: int, settings: str, data: list[str], bare: bool) -> dict[str, float]:
    """Seconds a step by step name; with ``bare``, also those of bare steps as "bare gan", "bare matching"."""
    from common import run_python  # not above, since ranks of the baseline run this file, too

    with tempfile.TemporaryDirectory(prefix="gdd-steps-") as folder:
        own = [str(Path(__file__).resolve()), "--rank-of", folder, *(["--bare"] if bare else []), "--"]
        command = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *own]
        run_python(checkout, [*command, *settings.split(), *SHORT.split(), *data, "--out", str(Path(folder, "run"))])
        moved = json.loads(Path(folder, "moved.json").read_text())
        # Of each step the discriminator moves first, then the generator.
        found = {name: moved[2 * i][WARM : WARM + TIMED + 1] for i, name in enumerate(STEP_NAMES)}
        seconds = {name: (times[-1 - bare] - times[0]) / (TIMED - bare) for name, times in found.items()}
        if bare:  # the last of these times is of the first bare step
            seconds |= {f"bare {n}": json.loads(Path(folder, f"bare-{n}.json").read_text()) for n in STEP_NAMES}
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--baseline", type=Path, help="another checkout")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 8], help="default 1 2 8")
    parser.add_argument("--rounds", type=int, default=3, help="default 3")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="default: all")
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("settings", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_of:
        sys.argv = ["gdd_dist.train", *args.settings]
        rank(args.rank_of, args.bare)
        return
    if args.baseline is None:
        parser.error("give --baseline DIR")
    from common import line
    from made_up import jpegs

    with tempfile.TemporaryDirectory(prefix="gdd-steps-data-") as scratch:
        data = {"digits": [], "cifar10-trial": ["--data", str(jpegs(Path(scratch), 1000, 32))]}
        for size in args.sizes:
            for ranks in args.ranks:
                rounds = [
                    [
                        measure(ROOT, ranks, SIZES[size], data[size], True),
                        measure(args.baseline.resolve(), ranks, SIZES[size], data[size], False),
                    ]
                    for _ in range(args.rounds)
                ]
                for name in STEP_NAMES:
                    ours, bare = (np.array([BATCH / one[key] for one, _ in rounds]) for key in (name, f"bare {name}"))
                    before = np.array([BATCH / other[name] for _, other in rounds])
                    about = {"size": size, "ranks": ranks, "batch": BATCH, "steps": TIMED, "rounds": args.rounds}
                    text = line(f"steps/{name}", ours, {"baseline": before}, "images/s", about)
                    over = {
                        "images/s": round(float(np.median(bare)), 1),
                        "ratio": round(float(np.median(ours / bare)), 3),
                    }
                    print(json.dumps({**text, "bare": over}), flush=True)


if __name__ == "__main__":
    main()
