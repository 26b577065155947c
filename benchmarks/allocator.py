"""What it costs on a CPU that glibc gives freed memory back after each step: training steps of ConvNets with its defaults and with ours.

    python benchmarks/allocator.py [--rounds 3]

Both sides are processes of one thread, in turn. Prints a JSON line for each network and batch: steps a second of CPU time, and by
side the page faults and the seconds in the kernel of a step. The machine may be busy.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from typing import Any

SETTINGS = (
    {"width": 128, "size": 16, "channels": 1, "batch": 10},
    {"width": 128, "size": 16, "channels": 1, "batch": 256},
    {"width": 32, "size": 32, "channels": 3, "batch": 20},
    {"width": 32, "size": 32, "channels": 3, "batch": 128},
    {"width": 128, "size": 32, "channels": 3, "batch": 100},
    {"width": 32, "size": 64, "channels": 3, "batch": 64},
)
SIDES: dict[str, dict[str, str]] = {"ours": {}, "defaults": {"MALLOC_ARENA_TEST": "8"}}
"""Environments. Any variable of the allocator leaves all of it to glibc; this one has glibc's own value, and changes nothing itself."""
WARM, STEPS = 3, 20


def costs(width: int, size: int, channels: int, batch: int) -> dict[str, float]:
    """Of a step in this process: seconds of CPU time, of these in the kernel, and page faults."""
    import torch

    from gdd_dist.models.classifiers import build_classifier
    from gdd_dist.runtime.world import World
    from gdd_dist.training.classifier_fit import sgd, train_step

    World("cpu")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    like = [0.0] * channels, [1.0] * channels
    net = build_classifier(f"convnet:{width}", channels=channels, size=size, classes=10, mean=like[0], std=like[1])
    optimizer, images = sgd(net, 0.01, 0.9, 5e-4), torch.randn(batch, channels, size, size)
    labels = torch.arange(batch) % 10
    before = None
    for step in range(WARM + STEPS):
        if step == WARM:
            before = resource.getrusage(resource.RUSAGE_SELF)
        train_step(net, optimizer, images, labels, 0.01, "float32")
    now = resource.getrusage(resource.RUSAGE_SELF)
    assert before is not None
    kernel = now.ru_stime - before.ru_stime
    return {
        "seconds": (now.ru_utime - before.ru_utime + kernel) / STEPS,
        "kernel": kernel / STEPS,
        "faults": (now.ru_minflt - before.ru_minflt) / STEPS,
    }


def measure(setting: dict[str, int], environment: dict[str, str]) -> dict[str, float]:
    """``costs`` in a process of its own."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, __file__, "--worker", json.dumps(setting)]
    done = subprocess.run(
        command, env={**clean, "OMP_NUM_THREADS": "1", **environment}, check=True, capture_output=True, text=True
    )
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="default 3")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(costs(**args.worker)))
        return
    import numpy as np
    from common import line

    for setting in SETTINGS:
        rounds = [{side: measure(setting, env) for side, env in SIDES.items()} for _ in range(args.rounds)]
        rates = {side: np.array([1 / one[side]["seconds"] for one in rounds]) for side in SIDES}
        about: dict[str, Any] = {**setting, "rounds": args.rounds, "threads": 1}
        text = line("allocator", rates["ours"], {"defaults": rates["defaults"]}, "steps/s of CPU time", about)
        for name in ("kernel", "faults"):
            text[name] = {side: round(float(np.median([one[side][name] for one in rounds])), 4) for side in SIDES}
        print(json.dumps(text), flush=True)


if __name__ == "__main__":
    main()
