"""What checkpoints cost, and what a kill costs: python benchmarks/checkpoint.py [--steps 500] [--ranks 2] [-- trainer settings]

Trains the GAN of the digits once to its end, at the default interval between checkpoints: the seconds spent in saving, as a share
of the step's (aim: at most 3 %). Then kills the whole job half an interval after a checkpoint, the mean case, and starts
the same command again: seconds from the kill to the first new step, seconds of work that is done twice. Prints JSON lines.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch


def start(args: argparse.Namespace, out: Path) -> subprocess.Popen[str]:
    """The trainer under torchrun, up to the GAN."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.ranks}"]
    size = ["--gan.steps", str(args.steps), "--teachers.seeds", "1", "--teachers.epochs", "1"]
    argv = ["--out", str(out), "--until", "gan", *size, *args.settings]
    return subprocess.Popen([*launch, "-m", "gdd_dist.train", *argv], text=True, stdout=2)


def saved(out: Path) -> dict[int, float]:
    """Step → when its checkpoint was durable, of those that are there."""
    return {int(p.stem[5:]): p.stat().st_mtime for p in out.glob("gan/*.partial/checkpoints/step-*.json")}


def cost(args: argparse.Namespace) -> dict[str, Any]:
    """One whole run: what its GAN says of its checkpoints."""
    out = args.out / "whole"
    shutil.rmtree(out, ignore_errors=True)
    if start(args, out).wait():
        sys.exit("the run failed")
    seconds = json.loads((out / "steps.json").read_text())["steps"]["gan"]["seconds"]
    info = json.loads((out / "gan" / "latest" / "contents.json").read_text())["info"]
    spent, count = info["checkpoint_seconds"], info["checkpoints"]
    return {"checkpoints": count, "seconds_saving": spent, "seconds": seconds, "share": round(spent / seconds, 5)}


def after_a_kill(args: argparse.Namespace) -> dict[str, float]:
    """Kill the whole job half an interval after its second checkpoint, start it again, watch for its first new step."""
    out = args.out / "killed"
    shutil.rmtree(out, ignore_errors=True)
    job = start(args, out)
    while len(found := saved(out)) < 2:
        if job.poll() is not None:
            sys.exit("the run ended before its second checkpoint: give more --steps")
        time.sleep(0.02)
    newest, before = sorted(found.values())[-1], sorted(found.values())[-2]
    time.sleep(max(0.0, newest + (newest - before) / 2 - time.time()))
    done, dead = max(saved(out)), time.time()
    job.kill()  # the ranks end with their torchrun
    job.wait()
    repeated = dead - saved(out)[done]
    args.settings = [*args.settings, "--checkpoint_seconds", "0"]  # so that the first new step shows
    job = start(args, out)
    while max(saved(out)) <= done and job.poll() is None:
        time.sleep(0.01)
    back = max(saved(out).values()) - dead
    job.kill()
    job.wait()
    return {"seconds_to_first_new_step": round(back, 2), "seconds_of_work_repeated": round(repeated, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500, help="steps of the GAN (default 500)")
    parser.add_argument("--ranks", type=int, default=2, help="ranks on this host (default 2)")
    parser.add_argument("--out", type=Path, default=Path("runs/checkpoint-benchmark"), help="where the runs lie")
    parser.add_argument("settings", nargs="*", help="settings of gdd_dist.train, after --")
    args = parser.parse_args()
    about = {
        "settings": {"ranks": args.ranks, "steps": args.steps, "trainer": list(args.settings)},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, CUDA {torch.cuda.is_available()}",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    found = cost(args)
    ours = round(args.steps / found["seconds"], 3)
    other = {"without saving": round(args.steps / (found["seconds"] - found["seconds_saving"]), 3)}
    rate = {"ours": ours, "other": other, "unit": "steps/s", "ratio": round(ours / other["without saving"], 5)}
    print(json.dumps({"benchmark": "checkpoint cost", **rate, **found, **about}), flush=True)
    lost = after_a_kill(args)
    print(json.dumps({"benchmark": "after a kill", **lost, "unit": "s", **about}), flush=True)


if __name__ == "__main__":
    main()
