"""A student's step as a CUDA graph against the same step as it is: the losses after each."""

from __future__ import annotations

from collections.abc import Iterator

from gdd_dist.engines.captured import WARM, Captured
from gpu_phases import Line, Task
from gpu_phases.agreement import TOLERANCE, losses
from gpu_phases.bench import SMALL, Bench

STEPS = WARM + 6


def find(task: Task) -> Iterator[Line]:
    """A line for each precision; on a CPU, which has no graphs, both sides are the step as it is. Raises where they differ."""
    off = {}
    for precision, allowed in TOLERANCE.items():
        bench = Bench(task.out / "data", task.out / "captured", task.device, [*SMALL, "--precision", precision])
        graphs = bench.ctx.device.type == "cuda"
        plain, replayed = first_losses(bench, False), first_losses(bench, graphs)
        off[precision] = max(abs(a - b) / abs(a) for a, b in zip(plain, replayed, strict=True))
        yield {"precision": precision, "graphs": graphs, "plain": plain, "replayed": replayed, "off": off[precision]}
        assert off[precision] <= allowed, f"a replayed step trains otherwise: {off[precision]:.2g} in {precision}"


def first_losses(bench: Bench, graph: bool) -> list[float]:
    """Of a student after each of its first steps; those after WARM are replayed if ``graph``."""
    with bench.trainee("student") as trainee:
        if graph:
            trainee.step = Captured(trainee.step)
        return [losses(trainee, "student", i)[0] for i in range(STEPS)]
