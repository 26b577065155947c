"""The phases of benchmarks/gpu.py: name → what it finds. This module loads no torch; the phases do."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Line = dict[str, Any]
"""What a phase finds, fit for JSON."""


@dataclass(frozen=True)
class Task:
    """What a phase is given. ``seconds``: until it is killed; ``before``: an earlier record; ``settings``: of the trainer, for the run."""

    out: Path
    device: str
    source: str | None = None
    seconds: float = 600.0
    before: Path | None = None
    settings: tuple[str, ...] = ()

    @property
    def small(self) -> bool:
        """Whether sizes are a rehearsal's."""
        return self.device == "cpu"


@dataclass(frozen=True)
class Phase:
    """``seconds``: its deadline on a GPU; ``timed``: it measures speed, so nothing may run beside it. It raises where something is wrong."""

    what: str
    seconds: float
    module: str
    arguments: tuple[Any, ...] = ()
    timed: bool = True

    def run(self, task: Task) -> Iterator[Line]:
        """What it finds, line by line."""
        find: Callable[..., Iterator[Line]] = importlib.import_module(f"gpu_phases.{self.module}").find
        return find(task, *self.arguments)


VARIANTS = ("bf16", "tf32", "float32", "fp16", "streamed", "deterministic", "channels_first", "compile")
"""Of the speed of the steps: a precision, or bf16 with one switch."""
PHASES = {
    "environment": Phase("what there is; one product and one convolution", 90, "environment"),
    "shards": Phase(
        "the data set, built with all workers and read; resident none, ram and device give equal images", 120, "shards"
    ),
    "agreement": Phase(
        "five losses of each training step, CPU against device, float32 and bf16", 150, "agreement", timed=False
    ),
    "skip": Phase(
        "fp16: a step that overflows moves nothing, lowers the scale, and the next one moves", 60, "skip", timed=False
    ),
    "synchronisations": Phase(
        "how often a step of each kind makes the host wait for the device", 90, "synchronisations", timed=False
    ),
    "resume": Phase(
        "killed in gan and in matching, and gone on: the weights of an undisturbed run", 240, "resume", timed=False
    ),
    "captured": Phase(
        "a student's step replayed as a CUDA graph: the losses of the step as it is", 60, "captured", timed=False
    ),
    "one-rank": Phase("a process group of one rank, DDP wrapped around both networks", 60, "one_rank", timed=False),
    "double-backward": Phase(
        "the discriminator's layers, differentiated twice: torch's convolution against ours", 60, "double_backward"
    ),
    **{
        f"speed/{v}": Phase(
            f"images/s, launches, memory of each step: {v}", 180 if v == "compile" else 120, "speed", (v,)
        )
        for v in VARIANTS
    },
    "run": Phase("whole runs of three seeds that fit the time that is left, their tables", 360, "run"),
}
_CHECKS = ["resume", "agreement", "skip", "synchronisations", "captured", "one-rank"]
_FIRST = ("bf16", "deterministic", "channels_first", "tf32", "streamed", "fp16", "float32", "compile")
CALLS = {
    "1": ["environment", "shards", *_CHECKS, "double-backward", *(f"speed/{v}" for v in _FIRST)],
    "2": ["environment", "shards", "run"],
}
"""First whether all is right, and as many rates as time allows, dear ones last; then whole runs."""
