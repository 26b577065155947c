"""The discriminator's step, this checkout against another: processes in turn, one JSON line a setting.

    git worktree add ../before e9ace49
    python benchmarks/discriminator_step.py --baseline ../before [--rounds 3] [--seconds 5] [--threads 1 2]

Settings: the networks and batches of the `digits` preset and of README's trial on CIFAR-10. ``ours``: images a second through this
checkout's step, ``other``: through the baseline's, medians over rounds; ``cpu``: the same for each second of CPU time, which other
jobs on this machine disturb less. A step is the trainer's own loss, penalties and backward, and
Adam's step, in one process, on images of noise; what is counted are real images, each of which brings one that was drawn.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

SETTINGS: dict[str, dict[str, Any]] = {
    "digits": {"batch": 64, "channels": 1, "size": 16, "width": 64, "blocks": 1, "patch": 2},
    "cifar10-trial": {"batch": 64, "channels": 3, "size": 32, "width": 64, "blocks": 1, "patch": 2},
}


class Engine:
    """One network and its Adam in one process."""

    def __init__(self, network: torch.nn.Module) -> None:
        self.network = network
        self._adam = torch.optim.Adam(network.parameters(), lr=1e-4, betas=(0.0, 0.99))

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.network(*inputs)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)


def found(name: str, *modules: str) -> Any:
    """``name`` from the first of gdd_dist's modules that this checkout has: a baseline may keep it elsewhere."""
    for module in modules:
        if importlib.util.find_spec(f"gdd_dist.{module.partition('.')[0]}") is not None:
            try:
                return getattr(importlib.import_module(f"gdd_dist.{module}"), name)
            except ModuleNotFoundError:
                continue
    raise SystemExit(f"no {name} in this checkout")


def rates(setting: dict[str, Any], threads: int, seconds: float) -> tuple[float, float]:
    """Images a second, and a second of CPU time, of the checkout on the path."""
    found("World", "runtime.world", "distributed")("cpu")  # sets torch up as the trainer does
    torch.set_num_threads(threads)
    shape = {k: v for k, v in setting.items() if k != "batch"}
    torch.manual_seed(0)
    engine = Engine(found("Discriminator", "models.discriminator")(classes=10, **shape))
    for weight in engine.network.parameters():  # some start at zero
        torch.nn.init.normal_(weight, std=0.05)
    batch, side = setting["batch"], setting["size"]
    images = torch.randn(2, batch, setting["channels"], side, side)
    labels = torch.arange(batch) % 10
    backward = found("Adversaries", "training.adversaries", "adversarial")._discriminator_backward

    def step() -> None:
        real, fake = images.clone()
        backward(SimpleNamespace(d=engine), real, fake, labels, 1.0)
        engine.step()

    for _ in range(3):
        step()
    begin, cpu, steps = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - begin < seconds:
        step()
        steps += 1
    return steps * batch / (time.perf_counter() - begin), steps * batch / (time.process_time() - cpu)


def measure(checkout: Path, name: str, threads: int, seconds: float) -> list[float]:
    """``rates`` in a process of its own, on the code of ``checkout``."""
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", name, "--threads", str(threads)]
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [*command, "--seconds", str(seconds)], cwd=checkout, env=environment, check=True, capture_output=True, text=True
    )
    figures: list[float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--baseline", type=Path, help="another checkout")
    parser.add_argument("--rounds", type=int, default=3, help="default 3")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement (default 5)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="default 1 2")
    parser.add_argument("--worker", choices=SETTINGS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(rates(SETTINGS[options.worker], options.threads[0], options.seconds)))
        return
    if options.baseline is None:
        parser.error("give --baseline DIR")
    import numpy as np
    from common import line

    here, other = Path(__file__).resolve().parents[1], options.baseline.resolve()
    for name, setting in SETTINGS.items():
        for threads in options.threads:
            rounds = []
            for _ in range(options.rounds):  # in turn, so that other jobs on this machine burden both alike
                rounds.append([measure(path, name, threads, options.seconds) for path in (here, other)])
            (ours, theirs), of_cpu = np.array(rounds).transpose(2, 1, 0)
            median = np.median(of_cpu, 1).round(1)
            cpu = {"ours": median[0], "other": median[1], "ratios": (of_cpu[0] / of_cpu[1]).round(3).tolist()}
            settings = {**setting, "threads": threads, "rounds": options.rounds, "seconds": options.seconds}
            text = line(f"discriminator_step/{name}", ours, {"baseline": theirs}, "images/s", settings)
            baseline = subprocess.run(["git", "rev-parse", "HEAD"], cwd=other, capture_output=True, text=True).stdout
            command = f"python benchmarks/discriminator_step.py --baseline DIR --rounds {options.rounds}"
            print(json.dumps({"command": command, **text, "cpu": cpu, "baseline": baseline.strip()}), flush=True)


if __name__ == "__main__":
    main()
