"""The first losses of each training step on the CPU and on the device, from the same inputs."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from gpu_phases import Line, Task
from gpu_phases.bench import LOSSES, SMALL, STEPS, Bench

FIRST = 5
TOLERANCE = {"float32": 1e-4, "bf16": 3e-2}
"""Of a loss, relative."""


def find(task: Task) -> Iterator[Line]:
    """A line for each precision and step. Raises at the end where any is off."""
    off = []
    for precision, allowed in TOLERANCE.items():
        settings = [*SMALL, "--precision", precision]
        # In this order: the CPU makes up what both read.
        found = [
            first_losses(Bench(task.out / "data", task.out / "agreement", d, settings)) for d in ("cpu", task.device)
        ]
        for step in STEPS:
            here, there = (torch.tensor(of[step], dtype=torch.float64) for of in found)
            worst = float(((here - there).abs() / here.abs().clamp(min=1e-2)).max())
            both = {"cpu": found[0][step], "device": found[1][step]}
            yield {"step": step, "precision": precision, **both, "off": worst, "allowed": allowed}
            if not worst <= allowed:
                off.append(f"{step} in {precision}: {worst:.2g}")
    assert not off, f"the CPU and {task.device} disagree: {', '.join(off)}"


def first_losses(bench: Bench) -> dict[str, list[list[float]]]:
    """Step → the losses of its first five steps."""
    found = {}
    for step in STEPS:
        with bench.trainee(step) as trainee:
            found[step] = [losses(trainee, step, i) for i in range(FIRST)]
    return found


def losses(trainee: object, step: str, number: int) -> list[float]:
    """Those of one step, of the weights before it; the student's, which tells none, of those after it."""
    batch = trainee.read(number)
    scalars = trainee.train(number, batch)
    if step == "student":
        scalars = {"loss": trainee.loss(batch)}
    return [float(scalars[name]) for name in LOSSES[step]]
