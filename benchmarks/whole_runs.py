"""Whole runs of the same settings and other seeds: their rows side by side, and differences paired by student and by run.

    for s in 0 1 2; do
        torchrun --nproc_per_node=2 -m gdd_dist.train --preset cifar10-cpu --data data/cifar10 --out runs/$s --seed $s --report.seeds 9 \
            --report.baselines real equal_bytes gaussian gan
    done
    python benchmarks/whole_runs.py runs/0 runs/1 runs/2 > benchmarks/results/cifar10-cpu.json

A difference of one run is the mean over its students, which share initial weights, order and latents; its error is that over runs, since
teachers, generators and data order differ between them.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from common import machine, versions

from gdd_dist.config.steps import TABLE
from gdd_dist.evaluation.kinds import kind_of

PAIRS = (
    ("matched", "gaussian"),
    ("matched", "gan"),
    ("gan", "gaussian"),
    ("matched", "real"),
    ("matched", "equal_bytes"),
    ("matched", "gaussian, best of 3"),
    ("matched", "real, best of 3"),
)
"""Which plain rows are compared. Besides, of each what is chosen or condensed with what is drawn, and condensed sets with real ones."""
Key = tuple[str, str, str, str, int]


def rows(metrics: dict[str, Any]) -> dict[Key, dict[str, Any]]:
    """(kind, student, protocol, labels, ipc) → the row, but for all real data."""
    return {
        (kind_of(r), r["student"], r["protocol"], r["labels"], r["ipc"]): r
        for r in metrics["results"]
        if r["ipc"] is not None
    }


def paired(runs: list[dict[Key, dict[str, Any]]], key: Key, other: Key) -> dict[str, Any]:
    """The difference of two rows in points: of each run, their mean, and its standard error over runs."""
    each = []
    for found in runs:
        ours, theirs = found[key]["accuracies"], found[other]["accuracies"]
        each.append(statistics.mean(a - b for a, b in zip(ours, theirs, strict=True)))
    error = statistics.stdev(each) / len(each) ** 0.5 if len(each) > 1 else None
    of_runs = [round(value, 3) for value in each]
    return {"of_runs": of_runs, "mean": round(statistics.mean(each), 3), "stderr": error and round(error, 3)}


def summary(metrics: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows and differences of several runs. Accuracies in percent; ``std``: over all students of all runs."""
    runs = [rows(m) for m in metrics]
    shown, differences = [], []
    for key, first in runs[0].items():
        of_runs = [found[key]["accuracies"] for found in runs]
        together = [a for one in of_runs for a in one]
        budget = {name: first[name] for name in ("optimizer_steps", "batch", "images_seen")}
        shown.append(
            {
                **dict(zip(("train_on", "student", "protocol", "labels", "ipc"), key, strict=True)),
                **budget,
                "mean": round(statistics.mean(together), 3),
                "std": round(statistics.stdev(together), 3),
                "of_runs": [round(statistics.mean(one), 3) for one in of_runs],
                "students": len(together),
                "bytes": round(statistics.mean(found[key]["bytes"] for found in runs)),
            }
        )
        name, others = key[0], [b for a, b in PAIRS if a == key[0]]
        others += [name.partition(",")[0]] if "," in name else []
        if ", condensed" in name:
            others += [kind for kind, *row in runs[0] if kind.partition(",")[0] == "real" and tuple(row) == key[1:]]
        for other in others:
            if (beside := (other, *key[1:])) in runs[0]:
                differences.append({"row": name, "minus": other, **paired(runs, key, beside)})
    return {"rows": shown, "differences": differences}


def seconds(run: Path) -> dict[str, float]:
    """What each step took when it was computed, by the records of its directory; a report reuses the students that it finds."""
    found = {}
    for step in TABLE:
        contents = json.loads((run / step / "latest" / "contents.json").read_text())
        found[step] = round(contents["cost"]["seconds"], 1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="run directories whose report is done")
    parser.add_argument("--note", default="", help="what else ran on the machine")
    args = parser.parse_args()
    metrics = [json.loads((run / "report" / "latest" / "metrics.json").read_text()) for run in args.runs]
    record = {
        "note": args.note,
        **summary(metrics),
        "gaps": [m["shortcut_gap"] for m in metrics],
        "seconds": [seconds(run) for run in args.runs],
        "hardware": metrics[0]["hardware"],
        "machine": machine(),
        "versions": versions("torch", "numpy"),
    }
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
