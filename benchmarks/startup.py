"""How long each command takes to answer, and a run to its first optimizer step, against `python -c "import torch"`.

    python benchmarks/startup.py [--baseline DIR] [--rounds 3] [--commands NAME ...]

All sides of a command are timed in turn, round after round, as processes of their own. Prints one JSON line for each command: starts
a minute, and `ratio` over `import torch`. ``--baseline DIR``: another checkout, timed beside them. A first step is timed from the start
of the processes until every rank has done one; the data set is there already, the run directory is new each time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from common import line, run_python

import sharding

ROOT = Path(__file__).resolve().parent.parent
FIRST_STEP = """
import os, runpy, sys
from torch.optim.optimizer import register_optimizer_step_post_hook
register_optimizer_step_post_hook(lambda *_: os._exit(0))
runpy.run_module("gdd_dist.train", run_name="__main__", alter_sys=True)
"""
TRAIN = ["-m", "gdd_dist.train"]
TORCH = ["-c", "import torch"]


def commands(data: Path, work: Path) -> dict[str, Callable[[], list[str]]]:
    """NAME → what python is given, with directories of its own below ``work`` each time."""
    script = work / "first_step.py"
    script.write_text(FIRST_STEP)

    def first_step(ranks: int) -> list[str]:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
        out = tempfile.mkdtemp(dir=work)
        return [*torchrun, str(script), "--data", str(data), "--out", out, "--preset", "digits"]

    return {
        "train --help": lambda: [*TRAIN, "--help"],
        "train --print_config": lambda: [*TRAIN, "--print_config"],
        "train --gan.setps 1": lambda: [*TRAIN, "--gan.setps", "1"],
        "status": lambda: ["-m", "gdd_dist.status", str(work / "run")],
        "evaluate --help": lambda: ["-m", "gdd_dist.evaluate", "--help"],
        "export --help": lambda: ["-m", "gdd_dist.export", "--help"],
        "doctor --help": lambda: ["-m", "gdd_dist.doctor", "--help"],
        "completion": lambda: ["-m", "gdd_dist.completion", "bash"],
        "sharding --help": lambda: ["-m", "sharding", "--help"],
        "search --help": lambda: ["tune/search.py", "--help"],
        "first step": lambda: first_step(1),
        "first step, 8 ranks": lambda: first_step(8),
    }


def seconds(checkout: Path, command: list[str]) -> float:
    """Wall time of python with this command in a checkout. A command that ends with a fault of its own raises."""
    return run_python(checkout, command, status=2 if "--gan.setps" in command else 0)


def measure(checkouts: dict[str, Path], make: Callable[[], list[str]], rounds: int) -> dict[str, np.ndarray]:
    """Side → starts a minute, [rounds]; the sides in turn."""
    found: dict[str, list[float]] = {"import torch": [], **{name: [] for name in checkouts}}
    for _ in range(rounds):
        found["import torch"].append(60 / seconds(ROOT, TORCH))
        for name, checkout in checkouts.items():
            found[name].append(60 / seconds(checkout, make()))
    return {name: np.array(values) for name, values in found.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--baseline", type=Path, help="another checkout of this project")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--commands", nargs="+", metavar="NAME", help="only these")
    args = parser.parse_args()
    checkouts = {"ours": ROOT}
    if args.baseline is not None:
        args.baseline = args.baseline.resolve()
        head = ["git", "rev-parse", "--short", "HEAD"]
        name = subprocess.run(head, cwd=args.baseline, capture_output=True, text=True, check=True).stdout.strip()
        checkouts[name] = args.baseline
    with tempfile.TemporaryDirectory(prefix="gdd-startup-") as scratch:
        data, run = Path(scratch, "digits"), Path(scratch, "run")
        sharding.build_digits(data)
        run.mkdir()
        # Only settings that every checkout knows.
        (run / "config.yaml").write_text(f"preset: digits\ndata: {data}\nout: {run}\n")
        for name, make in commands(data, Path(scratch)).items():
            if args.commands and name not in args.commands:
                continue
            found = measure(checkouts, make, args.rounds)
            ours = found.pop("ours")
            row = line("startup", ours, found, "starts/min", {"command": name, "rounds": args.rounds})
            row["over"] = {other: round(float(np.median(ours / values)), 3) for other, values in found.items()}
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
