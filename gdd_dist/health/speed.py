"""Measures the speed of this machine: decoding images, and training steps of torch."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from gdd_dist.health.finding import OK, WARN, Finding
from sharding.shards import decode

SLOW_JPEG = 1_500.0
JPEG_SIDE, JPEG_SECONDS = 64, 0.3
LOOP_STEPS, LOOP_ROUNDS = 20, 3


def jpeg_speed() -> Finding:
    """Measure images per second with the loader's decoder, on one thread and on all cores."""
    import simplejpeg

    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    payload = simplejpeg.encode_jpeg(np.ascontiguousarray(noise.repeat(JPEG_SIDE // 8, 0).repeat(JPEG_SIDE // 8, 1)))
    threads = len(os.sched_getaffinity(0))

    def work(_: int) -> int:
        out, done, end = np.empty((JPEG_SIDE, JPEG_SIDE, 3), np.uint8), 0, time.monotonic() + JPEG_SECONDS
        while time.monotonic() < end:
            decode(payload, out)
            done += 1
        return done

    one = work(0) / JPEG_SECONDS
    with ThreadPoolExecutor(threads) as pool:
        every = sum(pool.map(work, range(threads))) / JPEG_SECONDS
    detail = f"{one:,.0f} images/s on one thread, {every:,.0f} on {threads} ({JPEG_SIDE}×{JPEG_SIDE})"
    if one < SLOW_JPEG:
        fix = "try again if the machine is busy; else python -m pip install --force-reinstall simplejpeg"
        return Finding("jpeg", WARN, detail, fix)
    return Finding("jpeg", OK, detail)


def torch_speed() -> Finding:
    """Time a fixed loop of training steps. Quote it with every wall time, because machines differ by a factor of two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # one thread is least disturbed by other processes
    try:
        detail = (
            f"{LOOP_STEPS} steps of a fixed training loop: {_loop_time(torch.device('cpu')):.2f} s on one CPU thread"
        )
    finally:
        torch.set_num_threads(before)
    if torch.cuda.is_available():
        detail += f", {_loop_time(torch.device('cuda')):.3f} s on the GPU"
    return Finding("speed", OK, f"{detail}; quote this with any wall time")


def _loop_time(device: torch.device) -> float:
    """Return the seconds of LOOP_STEPS steps of two convolutions of width 32 on 16 float32 images of 32×32: the best round."""
    images = torch.zeros(16, 3, 32, 32, device=device)
    kernels = [torch.full((32, c, 3, 3), 0.01, device=device, requires_grad=True) for c in (3, 32)]

    def steps(count: int) -> float:
        begin = time.monotonic()
        for _ in range(count):
            x = images
            for kernel in kernels:
                x = torch.nn.functional.conv2d(x, kernel, padding=1).relu()
            x.sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.monotonic() - begin

    steps(2)  # warm-up: allocates memory and chooses kernels
    return min(steps(LOOP_STEPS) for _ in range(LOOP_ROUNDS))
