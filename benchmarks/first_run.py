"""`make train` to its end against an older checkout: wall time, the share of each step, and the accuracies of both.

    python benchmarks/first_run.py --baseline DIR [--rounds 3] [--ranks N] [--baseline-ranks 8] [-- settings of ours]

Both sides in turn, round after round; a round's number is the seed of both. Give settings that make our rows those of the baseline
(`--report.baselines real gan` for a checkout that knew no others). Prints a JSON line for each run as it ends, then a line with the
ratios of wall time and the paired differences of the accuracies.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import line, run_python

ROOT = Path(__file__).resolve().parent.parent


def run(checkout: Path, ranks: int, seed: int, settings: Sequence[str]) -> dict[str, Any]:
    """Train once in a new directory; its wall time in seconds, seconds of each step, accuracies by row."""
    with tempfile.TemporaryDirectory(prefix="gdd-first-run-") as out:
        torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "-m", "gdd_dist.train"]
        wall = run_python(checkout, [*torchrun, "--out", out, "--seed", str(seed), *settings])
        steps = json.loads(Path(out, "steps.json").read_text())["steps"]
        results = json.loads(Path(out, "report/latest/metrics.json").read_text())["results"]
    return {
        "wall": round(wall, 1),
        "ranks": ranks,
        "seed": seed,
        "steps": {name: step["seconds"] for name, step in steps.items()},
        "students": sum(len(row["accuracies"]) for row in results),
        "accuracy": {name_of(row): row["mean"] for row in results},
    }


def name_of(row: dict[str, Any]) -> str:
    """A row of metrics.json in words that both checkouts share."""
    return "/".join(str(row[key]) for key in ("train_on", "protocol", "labels", "ipc") if row[key] is not None)


def compare(ours: list[dict[str, Any]], baseline: list[dict[str, Any]]) -> dict[str, Any]:
    """The line of ratios: wall time, medians of each step, and by row our accuracy minus theirs, mean and standard error over rounds."""
    walls = [np.array([3600 / run["wall"] for run in side]) for side in (ours, baseline)]
    about = {"ranks": ours[0]["ranks"], "baseline ranks": baseline[0]["ranks"], "rounds": len(ours)}
    text = line("first_run", walls[0], {"baseline": walls[1]}, "runs/h", about)
    text["wall"] = round(float(np.median(walls[1] / walls[0])), 3)
    text["steps"] = {
        name: {step: round(float(np.median([run["steps"][step] for run in side])), 1) for step in side[0]["steps"]}
        for name, side in (("ours", ours), ("baseline", baseline))
    }
    text["differences"] = {}
    for row in baseline[0]["accuracy"]:
        apart = [one["accuracy"][row] - other["accuracy"][row] for one, other in zip(ours, baseline, strict=True)]
        error = float(np.std(apart, ddof=1) / np.sqrt(len(apart))) if len(apart) > 1 else None
        text["differences"][row] = [round(float(np.mean(apart)), 2), error and round(error, 2)]
    return text


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--baseline", type=Path, required=True, help="another checkout of this project")
    parser.add_argument("--rounds", type=int, default=3, help="rounds (default 3)")
    parser.add_argument("--ranks", type=int, default=2, help="our ranks (default 2, as `make train` has on two cores)")
    parser.add_argument("--baseline-ranks", type=int, default=8, help="theirs (default 8, as `make train` had)")
    parser.add_argument("settings", nargs="*", help="settings of ours, after --")
    args = parser.parse_args()
    sides: dict[str, list[dict[str, Any]]] = {"ours": [], "baseline": []}
    for seed in range(args.rounds):
        sides["ours"].append(run(ROOT, args.ranks, seed, args.settings))
        sides["baseline"].append(run(args.baseline.resolve(), args.baseline_ranks, seed, []))
        for name, done in sides.items():
            print(json.dumps({"benchmark": "first_run", "side": name, **done[-1]}), flush=True)
    print(json.dumps(compare(sides["ours"], sides["baseline"])), flush=True)


if __name__ == "__main__":
    main()
