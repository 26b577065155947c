"""Whole runs of several seeds on the shards, side by side, sized by what the speed phase has measured so that they fit the time that is left;
their tables, and differences paired by run.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from whole_runs import seconds, summary

from gpu_phases import Line, Task
from gpu_phases.bench import SMALL

RUNS = 3
"""Seeds, each a process; one GPU serves them all. A rehearsal has one."""
SHARES = {"teachers": 0.15, "matching": 0.15, "student": 0.35}
"""Of the time that is left; what no step counts (starting, Gaussians, logits, quick students) takes the rest."""
TRAININGS, TRAIN_IMAGES = 3, 47_500
BATCH, STUDENT_STEPS, ROWS = 256, 1_000, 12
"""Images of a step of teachers and matching; steps of 100 images of a student; a student of each row, in students: rows for which teachers
choose cost more than one.
"""
SLOW = {"teachers": 10_000.0, "matching": 1_000.0, "student": 10_000.0}
"""Images a second where nothing was measured."""


def find(task: Task) -> Iterator[Line]:
    """The runs' settings and times, a line for each row and difference. Raises where one does not end well."""
    size = SMALL if task.small else sized(task.seconds, measured(task.before or task.out / "gpu.jsonl"))
    argv = ["--preset", "cifar10", *size, "--data", str(task.out / "data"), "--device", task.device, *task.settings]
    seeds = range(1 if task.small else RUNS)
    yield {"settings": argv, "seeds": len(seeds), "seconds_left": round(task.seconds)}
    begin, root = time.perf_counter(), Path(__file__).resolve().parents[2]
    outs = [task.out / f"run-{seed}" for seed in seeds]
    commands = [
        [sys.executable, "-m", "gdd_dist.train", *argv, "--seed", str(seed), "--out", str(out)]
        for seed, out in zip(seeds, outs, strict=True)
    ]
    started = [subprocess.Popen(command, stdout=sys.stderr, cwd=root) for command in commands]
    codes = [process.wait() for process in started]
    yield {"seconds": round(time.perf_counter() - begin, 1), "steps": [seconds(out) for out in outs if done(out)]}
    assert not any(codes), f"the trainers ended with {codes}"
    metrics = [json.loads((out / "report/latest/metrics.json").read_text()) for out in outs]
    found = summary(metrics)
    yield from ({"row": row} for row in found["rows"])
    yield from ({"difference": difference} for difference in found["differences"])
    yield {"gaps": [m["shortcut_gap"] for m in metrics], "hardware": metrics[0]["hardware"]}
    yield from ({"full": row} for m in metrics for row in m["results"] if row["ipc"] is None)


def done(out: Path) -> bool:
    """Whether the run came to its report's end."""
    return (out / "report/latest/metrics.json").exists()


def measured(record: Path) -> dict[str, float]:
    """Images a second of each step under bf16, of teachers the slowest architecture's."""
    found: dict[str, float] = {}
    for text in record.open() if record.exists() else ():
        line = json.loads(text)
        if line["phase"] == "speed/bf16" and "images_per_second" in line:
            found[line["step"]] = min(found.get(line["step"], float("inf")), line["images_per_second"])
    return found


def sized(seconds: float, rates: Mapping[str, float]) -> list[str]:
    """Settings of runs that take about three quarters of ``seconds`` side by side: as many teachers' epochs, steps and students as fit.

    The Gaussians move by class labels and class means of features, as in `cifar10-cpu`; students see 1,000 steps of 100 images.
    """
    images = {step: 0.75 * seconds * share * {**SLOW, **rates}[step] / RUNS for step, share in SHARES.items()}
    epochs = max(2, int(images["teachers"] / (TRAININGS * TRAIN_IMAGES)))
    steps = max(200, int(images["matching"] / BATCH))
    students = max(1, int(images["student"] / (ROWS * STUDENT_STEPS * 100)))
    text = (
        f"--teachers.architectures convnet --teachers.seeds {TRAININGS} --teachers.snapshots 1 --teachers.epochs {epochs} "
        "--logits.views 2 --gaussian.spread 0.85 1.0 --gan.start gaussian --gan.steps 100 --gan.width 64 --gan.d_width 64 --gan.blocks 1 "
        "--gan.d_blocks 1 --gan.patch 2 --gan.augment none --gan.lr 5e-4 --matching.start gaussian "
        f"--matching.steps {steps} --matching.interval {steps // 2} --matching.group 16 --matching.lr 1e-3 --matching.lambda_pair 0 "
        "--matching.lambda_mean 0 --matching.lambda_label 0.05 --matching.lambda_feature 1 --matching.lambda_adv 0 "
        "--matching.quick_students 2 --matching.quick_steps 500 --report.ipc 10 --report.protocol regenerate --report.labels hard "
        f"--report.students convnet --report.seeds {students} --report.select 1 3 --report.baselines real equal_bytes gaussian full "
        f"--report.epochs {STUDENT_STEPS} --report.batch 100 --report.full_epochs 5 --report.ars false"
    )
    return text.split()
