"""Images a second, kernel launches, peak memory and share of bf16's peak of each training step, with one variant of switches."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from projection import Counter
from torch.profiler import ProfilerActivity, profile

from gdd_dist.data.images import prefetch
from gdd_dist.runtime.memory import peak_memory, reset_peak
from gpu_phases import Line, Task
from gpu_phases.bench import FIRST_WARM, SMALL, STEPS, Bench, switch, synchronize
from gpu_phases.synchronisations import Waits

PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""bf16 without sparsity, by data sheet."""
SECONDS, SHORT, SMALL_SECONDS, MOST = 3.0, 1.5, 0.5, 10_000
"""Of measuring a step in bf16, in the other variants, and in a rehearsal; steps at most."""
LONGEST = 10
"""Kernels that are named."""


def find(task: Task, variant: str) -> Iterator[Line]:
    """A line for each step, and in bf16 for each architecture of teachers, else for the last.

    A switch that this checkout lacks is said in a line of its own.
    """
    settings = switch(variant)
    if settings is None:
        yield {"variant": variant, "there": False}
        return
    # A discriminator's state belongs to fp16, whose loss is scaled, or to the other precisions.
    folder = task.out / ("preset" + "-small" * task.small + "-fp16" * (variant == "fp16"))
    bench = Bench(task.out / "data", folder, task.device, [*(SMALL if task.small else ()), *settings])
    architectures = bench.config.teachers.architectures[0 if variant == "bf16" else -1 :]
    seconds = SMALL_SECONDS if task.small else SECONDS if variant == "bf16" else SHORT
    # What compiles soonest comes first: a deadline leaves the rest out.
    for step in ("student", "teachers", "gan", "matching") if variant == "compile" else STEPS:
        for name in architectures if step == "teachers" else (None,):
            reset_peak(bench.ctx.device)
            with bench.trainee(step, name) as trainee:
                found = measured(bench, trainee, seconds)
            batch = bench.batch[step]
            work = operations(bench, step, name, variant, task.before or task.out / "gpu.jsonl")
            rate = batch / found["seconds"]
            share = rate * work / peak if work and (peak := peak_of(bench.ctx.device)) else None
            about = {
                "variant": variant,
                "there": True,
                "step": step,
                "architecture": name,
                "batch": batch,
                "settings": settings,
            }
            yield {
                **about,
                "images_per_second": round(rate, 1),
                **found,
                "flops_an_image": work,
                "share_of_bf16_peak": share,
            }


def measured(bench: Bench, trainee: Any, seconds: float) -> Line:
    """Seconds of a step, with its reading ahead: the median of several stretches; launches and peak memory."""
    device, found, done = bench.ctx.device, list[float](), 0
    batches = prefetch(trainee.read, 1, MOST, bench.config.loader.prefetch)  # step 0 is logged
    for step, batch in zip(range(1, 1 + FIRST_WARM), batches, strict=False):
        trainee.train(step, batch)
    step, begun = 1 + FIRST_WARM, time.perf_counter()
    stretch = 1 if device.type == "cpu" else 10
    while time.perf_counter() - begun < seconds and step + stretch < MOST:
        synchronize(device)
        begin = time.perf_counter()
        for _ in range(stretch):
            trainee.train(step, next(batches))
            step += 1
        synchronize(device)
        found.append((time.perf_counter() - begin) / stretch)
        done += stretch
    memory = peak_memory(device)
    launches = launched(device, trainee, step, next(batches))
    batches.close()
    return {
        "seconds": statistics.median(found),
        "fastest": min(found),
        "steps": done,
        "peak_memory": memory,
        **launches,
    }


def launched(device: torch.device, trainee: Any, step: int, batch: Any) -> Line:
    """Kernels that the host starts in a step, on a CPU operations; of a GPU the seconds that it was busy, and its longest
    kernels: name, how many, milliseconds of all.
    """
    if device.type == "cpu":
        with Waits(device) as waits:
            trainee.train(step, batch)
        return {"launches": waits.found["operations"]}
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        trainee.train(step, batch)
        synchronize(device)
    events = seen.key_averages()
    counts = {e.key: e.count for e in events if e.key.startswith("cu")}
    kernels = sorted(
        (e for e in events if e.device_type == torch.autograd.DeviceType.CUDA), key=lambda e: -e.self_device_time_total
    )
    busy = sum(e.self_device_time_total for e in kernels) / 1e6
    longest = [[e.key[:100], e.count, round(e.self_device_time_total / 1e3, 3)] for e in kernels[:LONGEST]]
    launches = sum(n for key, n in counts.items() if "Launch" in key)
    return {"launches": launches, "calls": counts, "busy_seconds": busy, "kernels": longest}


def operations(bench: Bench, step: str, architecture: str | None, variant: str, record: Path) -> float | None:
    """Floating-point operations of a step, by image: counted, but of compiled steps, which cannot be, found in the record of bf16."""
    if variant == "compile":
        return recorded(record, step, architecture)
    with bench.trainee(step, architecture) as trainee:
        batch = trainee.read(1)
        with Counter() as counter:
            trainee.train(1, batch)
    return counter.flops / bench.batch[step]


def recorded(record: Path, step: str, architecture: str | None) -> float | None:
    """What the phase of bf16 has counted, by this record or the first call's, if it ran."""
    lines = [json.loads(text) for text in record.open()] if record.exists() else []
    of = [
        x["flops_an_image"]
        for x in lines
        if x["phase"] == "speed/bf16" and (x.get("step"), x.get("architecture")) == (step, architecture)
    ]
    return of[-1] if of else None


def peak_of(device: torch.device) -> float | None:
    """Of a GPU that is known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for part, peak in PEAKS.items() if part in name), None)
