"""A whole run on the shards, sized by what the speed phase has measured so that it fits the time that is left, and its table."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from gpu_phases import Line, Task
from gpu_phases.bench import SMALL

SHARES = {"teachers": 0.25, "gan": 0.3, "matching": 0.15}
"""Of the time that is left; the report and what no step counts (starting, logits, quick students) take the rest."""
TRAININGS, TRAIN_IMAGES = 3, 47_500
SLOW = {"teachers": 10_000.0, "gan": 2_000.0, "matching": 1_000.0}
"""Images a second where nothing was measured."""


def find(task: Task) -> Iterator[Line]:
    """The run's settings and times, a line for each row of its table. Raises where it does not end well."""
    size = SMALL if task.small else sized(task.seconds, measured(task.before or task.out / "gpu.jsonl"))
    argv = ["--preset", "cifar10", *size, "--data", str(task.out / "data"), "--device", task.device, *task.settings]
    out = task.out / "run"
    yield {"settings": argv, "seconds_left": round(task.seconds)}
    begin = time.perf_counter()
    command = [sys.executable, "-m", "gdd_dist.train", *argv, "--out", str(out)]
    done = subprocess.run(command, stdout=sys.stderr, cwd=Path(__file__).resolve().parents[2])
    if (out / "steps.json").exists():
        yield {
            "seconds": round(time.perf_counter() - begin, 1),
            "steps": json.loads((out / "steps.json").read_text())["steps"],
        }
    assert done.returncode == 0, f"the trainer ended with {done.returncode}"
    for row in json.loads((out / "report/latest/metrics.json").read_text())["results"]:
        yield {"row": row}


def measured(record: Path) -> dict[str, float]:
    """Images a second of each step under bf16, of teachers the slowest architecture's."""
    found: dict[str, float] = {}
    for text in record.open() if record.exists() else ():
        line = json.loads(text)
        if line["phase"] == "speed/bf16" and "images_per_second" in line:
            found[line["step"]] = min(found.get(line["step"], float("inf")), line["images_per_second"])
    return found


def sized(seconds: float, rates: Mapping[str, float]) -> list[str]:
    """Settings of a run of preset cifar10 that takes about three quarters of ``seconds``: fewer teachers, steps and rows."""
    images = {step: 0.75 * seconds * share * rates.get(step, SLOW[step]) for step, share in SHARES.items()}
    epochs = max(2, int(images["teachers"] / (TRAININGS * TRAIN_IMAGES)))
    steps = {step: max(100, int(images[step] / 256)) for step in ("gan", "matching")}
    text = (
        f"--teachers.seeds 1 --teachers.snapshots 2 --teachers.epochs {epochs} --logits.views 2 --gan.steps {steps['gan']} "
        f"--matching.steps {steps['matching']} --matching.interval {max(50, steps['matching'] // 2)} --matching.quick_students 2 "
        "--matching.quick_steps 300 --report.ipc 10 --report.protocol regenerate --report.students convnet --report.seeds 2 "
        f"--report.baselines real gaussian gan full --report.epochs 500 --report.full_epochs {max(2, epochs // 2)} --report.ars false"
    )
    return text.split()
