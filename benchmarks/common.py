"""The JSON line that every benchmark prints, and what several benchmarks do to get their figures."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gdd_dist.runtime.versions import commit


def line(
    benchmark: str, ours: np.ndarray, others: dict[str, np.ndarray], unit: str, settings: dict[str, Any]
) -> dict[str, Any]:
    """A line from the figures of each round, [rounds]; more is better, `ratio` is the median over rounds against the best other."""
    medians = {name: float(np.median(values)) for name, values in others.items()}
    best = max(medians, key=lambda name: medians[name])
    ratios = ours / others[best]
    return {
        "benchmark": benchmark,
        "ours": round(float(np.median(ours)), 1),
        "other": {name: round(value, 1) for name, value in medians.items()},
        "unit": unit,
        "ratio": round(float(np.median(ratios)), 3),
        "ratios": [round(float(r), 3) for r in ratios],
        "settings": settings,
        "machine": machine(),
        "versions": versions(
            "torch", "numpy", "simplejpeg", "pillow", "webdataset", "mosaicml-streaming", "torchvision", "deepspeed"
        ),
        "commit": commit(),
    }


def run_python(checkout: Path, command: Sequence[str], status: int = 0) -> float:
    """Seconds by the clock of python with this command, on the code of a checkout. Raises SystemExit if its exit status is another."""
    env = {**os.environ, "PYTHONPATH": str(checkout)}
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, *command], cwd=checkout, env=env, capture_output=True, text=True)
    passed = time.perf_counter() - begin
    if done.returncode != status:
        raise SystemExit(f"{command} in {checkout} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return passed


def rates(step: Callable[[], object], images: int, seconds: float) -> tuple[float, float]:
    """Images a minute of steps of ``images``: of this process's CPU time, which other jobs hardly touch, and by the clock.

    Steps are repeated until they took ``seconds`` of CPU time in all.
    """
    wall, cpu, done = time.perf_counter(), time.process_time(), 0
    while not done or time.process_time() - cpu < seconds:
        step()
        done += images
    return 60 * done / (time.process_time() - cpu), 60 * done / (time.perf_counter() - wall)


def rounded(values: Mapping[str, float]) -> dict[str, float]:
    """To six digits."""
    return {name: float(f"{value:.6g}") for name, value in values.items()}


def machine() -> str:
    """What the figures were measured on."""
    model = "unknown CPU"
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as info:
            names = [text.partition(":")[2].strip() for text in info if text.startswith("model name")]
        model = names[0] if names else model
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{platform.machine()}, {model}, {len(os.sched_getaffinity(0))} cores, {gpu}, load {os.getloadavg()[0]:.1f}"


def versions(*names: str) -> dict[str, str]:
    """The versions of those libraries that are installed."""
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
