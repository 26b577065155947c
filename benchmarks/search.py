"""What the search costs over its trials, and what computing teachers, logits and GAN once saves.

    python benchmarks/search.py [--trials 12] [--rounds 1] [--whole 1] [--out runs/benchmark-search] [-- trainer settings]

Prints two JSON lines. `search-overhead`: seconds of N trials through the search, one at a time, from the first trial's start to the last
one's end (Ray is up), against the same N matching runs typed by hand, one after the other, on the same store. `search-reuse`: seconds a
trial costs in this search, the shared steps' share included, against a run that computes teachers, logits and GAN for itself; of
those `--whole` are measured. Both sides use one thread.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import machine, versions

from tune import environment

SMALL = (
    "--teachers.seeds 1 --teachers.epochs 8 --gan.steps 150 --matching.steps 80 --matching.interval 40 "
    "--matching.quick_students 2 --matching.quick_steps 100"
)
"""Settings of the trainer by default: the digits preset, shortened so that a trial takes some ten seconds."""


def through_search(out: Path, args: argparse.Namespace) -> tuple[float, float]:
    """(seconds of the shared steps, seconds of the trials), Ray's start left out."""
    import torch

    from gdd_dist.pipeline.preflight import check
    from sharding.manifest import Manifest
    from sharding.writer import build
    from tune import cluster, driver, shared
    from tune.gang import Job
    from tune.options import parse
    from tune.record import Record

    own = ["--out", str(out), "--trials", str(args.trials), "--max-concurrent", "1", "--scheduler", "fifo"]
    search = parse([*own, *args.settings])
    build("digits", out / "data")
    check(search.config, Manifest.load(out / "data"), 1, torch.device("cpu"))
    config = dataclasses.replace(
        search.config, data=str(out.resolve() / "data"), store=str(out.resolve()), device="cpu"
    )
    base, record = Job(config, search.preset, 1, 1.0, 0.0), Record(out.resolve())
    with cluster.cluster(None):
        base = shared.settle_precision(base)
        begin = time.monotonic()
        shared.compute(base, out.resolve(), 1)
        middle = time.monotonic()
        driver.trials(search, record, base)
        end = time.monotonic()
    if {o.status for o in record.outcomes().values()} != {"finished"}:
        raise SystemExit(f"a trial failed: {out}/trials.jsonl")
    return middle - begin, end - middle


def by_hand(out: Path, store: Path) -> float:
    """Seconds of the same trials as the trainer's own command, one after the other, on a store without their results."""
    for step in ("teachers", "logits", "gaussian", "gan", "cache"):  # the cache: images decoded once
        if (out / step).exists():
            shutil.copytree(out / step, store / step)
    begin = time.monotonic()
    for trial in sorted((out / "trials").iterdir()):
        typed(["--config", str(trial / "config.yaml"), "--out", str(store / trial.name), "--store", str(store)])
    return time.monotonic() - begin


def whole(out: Path, fresh: Path) -> float:
    """Seconds of one run that computes everything up to matching for itself."""
    begin = time.monotonic()
    typed(["--config", str(out / "trials" / "000" / "config.yaml"), "--out", str(fresh), "--store", str(fresh)])
    return time.monotonic() - begin


def typed(argv: list[str]) -> None:
    subprocess.run(
        [sys.executable, "-m", "gdd_dist.train", *argv], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def line(name: str, ours: float, other: dict[str, float], unit: str, args: argparse.Namespace, **more: object) -> None:
    print(
        json.dumps(
            {
                "benchmark": name,
                "ours": round(ours, 3),
                "other": {k: round(v, 3) for k, v in other.items()},
                "unit": unit,
                "ratio": round(min(other.values()) / ours, 4),
                "settings": {"trials": args.trials, "rounds": args.rounds, "trainer": args.settings, **more},
                "machine": machine(),
                "versions": versions("torch", "ray", "optuna"),
            }
        ),
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=12, help="trials a round (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=1, help="search and by hand, in turns (default %(default)s)")
    parser.add_argument("--whole", type=int, default=1, help="whole runs a round (default %(default)s)")
    parser.add_argument("--out", default="runs/benchmark-search", help="removed first (default %(default)s)")
    parser.add_argument("settings", nargs="*", help="settings of gdd_dist.train, after --")
    args = parser.parse_args()
    args.settings = args.settings or SMALL.split()
    environment.prepare(None)
    shutil.rmtree(args.out, ignore_errors=True)
    shared, ours, hand, alone = [], [], [], []
    for n in range(args.rounds):
        out = Path(args.out) / str(n)
        out.mkdir(parents=True)
        seconds = through_search(out, args)
        shared.append(seconds[0])
        ours.append(seconds[1])
        hand.append(by_hand(out, out / "by-hand"))
        alone += [whole(out, out / f"whole-{k}") for k in range(args.whole)]
    mean = {k: sum(v) / len(v) for k, v in (("shared", shared), ("ours", ours), ("hand", hand), ("alone", alone))}
    line("search-overhead", mean["ours"], {"by hand": mean["hand"]}, f"s for {args.trials} trials", args)
    a_trial = (mean["shared"] + mean["ours"]) / args.trials
    line("search-reuse", a_trial, {"recompute": mean["alone"]}, "s a trial", args, whole_runs=len(alone))


if __name__ == "__main__":
    main()
