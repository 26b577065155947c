"""Killed in the middle of gan and of matching, and gone on, against an undisturbed run: the same weights, bit for bit."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from gpu_phases import Line, Task
from gpu_phases.bench import SMALL, exists

HALF = 6
"""The step of twelve before which the process is killed."""
PROGRAM = """
import os, signal, sys
from gdd_dist import train
from gdd_dist.runtime.run_program import run_program
from gdd_dist.training import loop

class Kill(loop.Watcher):
    def before_step(self, trainee, step):
        if (trainee.name, step) == (sys.argv[1], int(sys.argv[2])):
            os.kill(os.getpid(), signal.SIGKILL)

loop.watchers.append(Kill())
run_program(train.main, sys.argv[3:])
"""


def find(task: Task) -> Iterator[Line]:
    """A line for each step. Raises where bits differ though the trainer promises that they do not: on a CPU, and under --deterministic."""
    folder, promised = task.out / "resume", exists("deterministic") or task.device == "cpu"
    shutil.rmtree(folder, ignore_errors=True)
    argv = [
        "--preset",
        "cifar10",
        *SMALL,
        "--data",
        str(task.out / "data"),
        "--device",
        task.device,
        "--until",
        "matching",
        "--teachers.batch",
        "500",
    ]
    argv += [
        "--checkpoint_seconds",
        "0",
        "--precision",
        "bf16",
        *(["--deterministic", "true"] if exists("deterministic") else []),
    ]
    started("no step", argv, folder / "whole")
    for step in ("teachers", "logits", "gaussian"):
        shutil.copytree(folder / "whole" / step, folder / "killed" / step, symlinks=True)
    for step in ("gan", "matching"):
        started(step, argv, folder / "killed", -signal.SIGKILL)
    started("no step", argv, folder / "killed")
    off = {}
    for step in ("gan", "matching"):
        off[step] = difference(
            *(folder / side / step / "latest" / "generator.safetensors" for side in ("whole", "killed"))
        )
        yield {"step": step, "largest_difference": off[step], "equal_bits": off[step] == 0, "promised": promised}
    assert not promised or not any(off.values()), "a run that was killed ends with other weights"


def started(killed_in: str, argv: Sequence[str], out: Path, expected: int = 0) -> None:
    """The trainer in a process of its own. Raises where it does not end as expected."""
    command = [sys.executable, "-c", PROGRAM, killed_in, str(HALF), *argv, "--out", str(out)]
    code = subprocess.run(command, stdout=sys.stderr, cwd=Path(__file__).resolve().parents[2]).returncode
    assert code == expected, f"the trainer ended with {code}, not {expected}"


def difference(one: Path, two: Path) -> float:
    """The largest of any two numbers of two files of the same tensors."""
    a, b = load_file(one), load_file(two)
    assert a.keys() == b.keys()
    return max(float(np.abs(a[name].astype(np.float64) - b[name].astype(np.float64)).max()) for name in a)
