"""Optimizer steps a second of the report's students, by kind, against an older checkout; and seeds of a row trained together.

    python benchmarks/students.py [--baseline DIR] [--rounds 3] [--kinds matched/regenerate/soft ...] [-- trainer settings]

Both sides are processes of one thread that train the same students on the same random networks, kind by kind, in turn. The machine
may be busy: figures are steps a second of the process's own CPU time; `wall` has the same by the clock. A figure covers the whole student:
drawing, labelling, augmentation, training, the test. Prints one JSON line for each kind; `ratio` is over the baseline, and both sides'
accuracies stand beside it. The last line trains three seeds of one row as one batched network (torch.func), against one by one.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

KINDS = (
    "full/all/hard",
    "real/regenerate/hard",
    "matched/regenerate/hard",
    "matched/regenerate/soft",
    "real/fixed/soft",
    "matched/fixed/soft",
    "matched/fixed/soft/plain",
)
SMALL = ["--preset", "digits", "--device", "cpu", "--report.epochs", "100", "--report.full_epochs", "2"]
INPUTS = ("teachers", "gan", "matching")
SEEDS = 3


def piece(name: str, *modules: str) -> Any:
    """What the first of these modules that a checkout has calls ``name``; older checkouts keep it elsewhere."""
    for module in modules:
        try:
            return getattr(importlib.import_module(module), name)
        except (ModuleNotFoundError, AttributeError):
            continue
    raise ImportError(f"none of {modules} has {name}")


def context(folder: Path, settings: Sequence[str]) -> Any:
    """A checkout's own view of the run in ``folder``, one process of one thread."""
    from sharding.manifest import Manifest

    world = piece("World", "gdd_dist.runtime.world", "gdd_dist.distributed")
    world.threads = 1
    torch.set_num_threads(1)
    parse = piece("parse", "gdd_dist.config.command_line", "gdd_dist.config")
    data, out = folder / "data", folder / "out"
    config = parse([*SMALL, *settings, "--data", str(data), "--out", str(out)]).config
    store = piece("Store", "gdd_dist.storage.store", "gdd_dist.artifacts")(out)
    make = piece("Context", "gdd_dist.training.context", "gdd_dist.context")
    return make(config, world("cpu"), data, Manifest.load(data), store, out, "float32", keeps=False)


def made_up(folder: Path, settings: Sequence[str]) -> None:
    """The digits, and the networks that students learn from, untrained."""
    from gdd_dist.models.files import GENERATOR, TEACHERS, save_network
    from gdd_dist.steps.gan import networks
    from gdd_dist.storage.json_files import write_json
    from sharding.writer import build

    build("digits", folder / "data", piece("Options", "sharding.options", "sharding.plan")(workers=1))
    ctx, records = context(folder, settings), []
    for name in INPUTS:
        (folder / name).mkdir()
    for seed in range(ctx.config.teachers.seeds):
        for name in ctx.config.teachers.architectures:
            file, meta = f"{len(records)}.safetensors", {"format": "gdd-classifier/1", "architecture": name}
            save_network(folder / "teachers" / file, ctx.classifier(name, seed, "benchmark"), meta)
            known = {"seed": seed, "step": 1, "snapshot": 0, "last": True, "val_accuracy": 50.0}
            records.append({"file": file, "architecture": name, **known})
    write_json(folder / "teachers" / TEACHERS, {"format": "gdd-teachers/1", "teachers": records})
    generator = networks(ctx)[0]
    for name in INPUTS[1:]:
        save_network(folder / name / GENERATOR, generator, {"format": "gdd-generator/1", "arch": generator.arch})


def serve(folder: Path, settings: Sequence[str]) -> None:
    """A side: for each kind on standard input train a student, say what it cost."""
    jobs = piece("jobs", "gdd_dist.evaluation.rows", "gdd_dist.rows")
    frozen = piece("Frozen", "gdd_dist.evaluation.students", "gdd_dist.students")
    train = piece("train", "gdd_dist.evaluation.students", "gdd_dist.students")
    ctx = context(folder, settings)
    ready = frozen(ctx, {name: folder / name for name in INPUTS})
    ready.teachers, ready.generator("gan"), ready.generator("matched")
    students = {}
    for job in jobs(ctx.config, ctx.manifest, "float32", dict.fromkeys(("data", *INPUTS), "0" * 16)):
        r = job.row
        kind = "/".join((r.train_on, r.protocol or "all", r.labels, *([] if r.augmented else ["plain"])))
        students.setdefault(kind, job)
    ctx.images("train").read(np.arange(2)), ctx.images("test").read(np.arange(2))
    for line in sys.stdin:
        job = students[line.strip()]
        wall, cpu = time.perf_counter(), time.process_time()
        result, _ = train(ctx, ready, job)
        cost = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        print(json.dumps({**cost, "steps": job.budget.optimizer_steps, "accuracy": result.accuracy}), flush=True)


class Side:
    """A checkout's process."""

    def __init__(self, root: Path, folder: Path, settings: Sequence[str]) -> None:
        command = [sys.executable, __file__, "--side-of", str(folder), "--", *settings]
        environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            command, cwd=root, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def train(self, kind: str) -> dict[str, float]:
        """What a student of this kind cost."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(kind + "\n")
        self._process.stdin.flush()
        found: dict[str, float] = json.loads(self._process.stdout.readline())
        return found

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def one_by_one(ctx: Any, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
    """A step of each of SEEDS students; images [SEEDS, B, C, H, W], labels [SEEDS, B]."""
    from gdd_dist.training.classifier_fit import sgd, train_step
    from gdd_dist.training.skipped_steps import Skips

    r = ctx.config.report
    nets = [ctx.classifier(r.students[0], 0, f"benchmark/{seed}") for seed in range(SEEDS)]
    optimizers, skips = [sgd(net, r.lr, r.momentum, r.weight_decay) for net in nets], Skips()

    def step() -> None:
        for net, optimizer, x, y in zip(nets, optimizers, images, labels, strict=True):
            skips.note(train_step(net, optimizer, x, y, r.lr, "float32"))

    return step


def together(ctx: Any, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
    """The same step, of one network whose weights have a first dimension of SEEDS."""
    from gdd_dist.engines.nonfinite import all_finite

    r = ctx.config.report
    nets = [ctx.classifier(r.students[0], 0, f"benchmark/{seed}") for seed in range(SEEDS)]
    weights, buffers = torch.func.stack_module_state(nets)
    optimizer = torch.optim.SGD(weights.values(), lr=r.lr, momentum=r.momentum, weight_decay=r.weight_decay, fused=True)

    def loss(own: Any, kept: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(torch.func.functional_call(nets[0], (own, kept), (x,)), y)

    gradients = torch.func.vmap(torch.func.grad(loss))

    def step() -> None:
        for name, gradient in gradients(weights, buffers, images, labels).items():
            weights[name].grad = gradient
        if all_finite(weights.values()):
            optimizer.step()

    return step


def rates(step: Callable[[], None], steps: int = 20) -> tuple[float, float]:
    """Calls a second, by the process's CPU time and by the clock."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(steps):
        step()
    return steps / (time.process_time() - cpu), steps / (time.perf_counter() - wall)


def seeds_together(folder: Path, settings: Sequence[str], rounds: int) -> dict[str, Any]:
    """The JSON line of three seeds together (ours) against one by one."""
    from common import line

    ctx = context(folder, settings)
    size, batch = ctx.manifest.height, min(ctx.config.report.batch, ctx.config.report.ipc[0] * ctx.classes)
    images, labels = torch.randn(SEEDS, batch, ctx.manifest.channels, size, size), torch.arange(batch) % ctx.classes
    steps = [make(ctx, images, labels.expand(SEEDS, -1)) for make in (together, one_by_one)]
    for step in steps:
        step()
    found = np.array([[rates(step) for step in steps] for _ in range(rounds)])  # [rounds, sides, clocks]
    about = {"student": ctx.config.report.students[0], "seeds": SEEDS, "batch": batch, "threads": 1}
    text = line("students/together", found[:, 0, 0], {"one by one": found[:, 1, 0]}, "steps/s of CPU time", about)
    return {**text, "wall": by_clock(found[:, 0, 1], found[:, 1, 1], "one by one")}


def by_clock(ours: np.ndarray, other: np.ndarray, name: str) -> dict[str, Any]:
    """Medians by the clock."""
    medians = {"ours": float(np.median(ours)), name: float(np.median(other)), "ratio": float(np.median(ours / other))}
    return {k: round(v, 3) for k, v in medians.items()}


def compare(kind: str, sides: Sequence[Side], rounds: int, settings: Sequence[str]) -> dict[str, Any]:
    """The JSON line of a kind: ours, then the baseline, then ours …"""
    from common import line

    found = [[side.train(kind) for side in sides] for _ in range(rounds)]
    cpu, wall = (np.array([[one["steps"] / one[clock] for one in pair] for pair in found]) for clock in ("cpu", "wall"))
    about = {"settings": [*SMALL, *settings], "steps": int(found[0][0]["steps"]), "threads": 1}
    text = line(f"students/{kind}", cpu[:, 0], {"baseline": cpu[:, -1]}, "steps/s of CPU time", about)
    accuracies = [round(side["accuracy"], 4) for side in found[0]]
    clock = by_clock(wall[:, 0], wall[:, -1], "baseline")
    return {**text, "wall": clock, "accuracy": {"ours": accuracies[0], "baseline": accuracies[-1]}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--baseline", type=Path, help="another checkout (default: this one, so the ratio is noise)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds (default 3)")
    parser.add_argument("--kinds", nargs="*", default=KINDS, help=f"none, or some of {' '.join(KINDS)}")
    parser.add_argument("--side-of", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("settings", nargs="*", help="settings of gdd_dist.train, after --")
    args = parser.parse_args()
    if args.side_of:
        serve(args.side_of, args.settings)
        return
    here = Path(__file__).resolve().parent.parent
    with tempfile.TemporaryDirectory(prefix="gdd-students-") as scratch:
        folder = Path(scratch)
        made_up(folder, args.settings)
        sides = [Side(root, folder, args.settings) for root in (here, (args.baseline or here).resolve())]
        for side in sides:
            for kind in args.kinds[:1]:
                side.train(kind)  # first calls cost more
        for kind in args.kinds:
            print(json.dumps(compare(kind, sides, args.rounds, args.settings)), flush=True)
        for side in sides:
            side.close()
        print(json.dumps(seeds_together(folder, args.settings, args.rounds)), flush=True)


if __name__ == "__main__":
    main()
