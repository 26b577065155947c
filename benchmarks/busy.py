"""A training step of a small network on all cores, on an idle machine and beside busy loops, by how OpenMP's threads wait for each other.

    python benchmarks/busy.py [--loops 0 4] [--rounds 3] [--seconds 4]

Prints a JSON line for each number of loops: median milliseconds of a step with threads that spin shortly and then sleep (as gdd_dist
sets it), spin for long (OpenMP's default), or sleep at once, and with one thread. Each round runs all of them, one after the other.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from contextlib import ExitStack

from common import machine, versions

WAYS = {
    "short": {"GOMP_SPINCOUNT": "1000"},
    "default": {},
    "sleep": {"OMP_WAIT_POLICY": "passive"},
    "one": {"OMP_NUM_THREADS": "1"},
}
STEP = """
import sys, time, torch
from gdd_dist.models.classifiers import build_classifier
from gdd_dist.training.classifier_fit import sgd, train_step
torch.manual_seed(0)
net = build_classifier("convnet:32", channels=3, size=32, classes=10, mean=[0.0] * 3, std=[1.0] * 3)
step = net, sgd(net, 0.01, 0.9, 5e-4), torch.rand(20, 3, 32, 32) * 2 - 1, torch.arange(20) % 10, 0.01, "bf16"
for _ in range(3):
    train_step(*step)
begin, count = time.perf_counter(), 0
while time.perf_counter() - begin < float(sys.argv[1]):
    train_step(*step)
    count += 1
print(1000 * (time.perf_counter() - begin) / count)
"""


def milliseconds(way: str, seconds: float) -> float:
    """Of a step, in a process of its own."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))} | WAYS[way]
    argv = [sys.executable, "-c", STEP, str(seconds)]
    return float(subprocess.run(argv, env=env, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--loops", type=int, nargs="+", default=[0, 4], help="busy loops beside it (default: none, and 4)"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement (default %(default)s)")
    args = parser.parse_args()
    for loops in args.loops:
        with ExitStack() as beside:
            for _ in range(loops):
                busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
                beside.callback(busy.wait)
                beside.callback(busy.kill)
            rounds = [{way: milliseconds(way, args.seconds) for way in WAYS} for _ in range(args.rounds)]
        found = {way: round(statistics.median(one[way] for one in rounds), 1) for way in WAYS}
        ratio = round(statistics.median(one["default"] / one["short"] for one in rounds), 2)
        settings = {"loops": loops, "rounds": args.rounds, "seconds": args.seconds}
        line = {"benchmark": "busy", "milliseconds": found, "ratio": ratio, "settings": settings}
        print(json.dumps({**line, "machine": machine(), "versions": versions("torch")}), flush=True)


if __name__ == "__main__":
    main()
