"""Standardized against un-standardized matching over whole runs: teachers, GAN, matching and students of each seed are its own.

    python benchmarks/standardization.py [--seeds 3] [--out runs/standardization] [--ranks 2] [--shared STORE] [-- trainer settings]

With ``--shared`` the seeds are those of matching and students alone; what comes before is that of a finished run.
Prints one JSON line for each kind of labels: accuracy on test of the matched generator's students (regenerate) with skd and with
kd, the mean difference over seeds and its standard error, in points.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch


def whole_run(args: argparse.Namespace, seed: int, loss: str) -> dict[str, float]:
    """Train one seed with one loss (what comes before matching is shared by its two losses); labels → accuracy in percent."""
    out = Path(args.out) / f"seed-{seed}-{loss}"
    launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={args.ranks}", "-m", "gdd_dist.train"]
    store = args.shared or Path(args.out) / "store"
    seeds = [f"--matching.seed={seed}", f"--report.seed={seed}"] if args.shared else [f"--seed={seed}"]
    where = ["--out", str(out), "--store", str(store), *seeds, "--matching.loss", loss]
    rows = ["--report.protocol", "regenerate", "--report.baselines", "gan"]
    subprocess.run([*launch, *where, *rows, *args.settings], check=True, stdout=sys.stderr)
    results = json.loads((out / "report/latest/metrics.json").read_text())["results"]
    return {r["labels"]: r["mean"] for r in results if r["train_on"] == "matched"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="whole runs of each loss (default 3)")
    parser.add_argument(
        "--out", default="runs/standardization", help="where the runs lie; they resume (default %(default)s)"
    )
    parser.add_argument("--ranks", type=int, default=2, help="ranks on this host (default 2)")
    parser.add_argument(
        "--shared", type=Path, help="store of a finished run, whose teachers, logits and generators all seeds share"
    )
    parser.add_argument("settings", nargs="*", help="settings of gdd_dist.train, after --")
    args = parser.parse_args()
    runs = [(whole_run(args, seed, "skd"), whole_run(args, seed, "kd")) for seed in range(args.seeds)]
    for labels in runs[0][0]:
        skd, kd = (np.array([run[i][labels] for run in runs]) for i in (0, 1))
        difference = skd - kd
        line = {
            "benchmark": "standardization",
            "ours": round(float(skd.mean()), 2),
            "other": {"kd": round(float(kd.mean()), 2)},
            "unit": f"% on test, {labels} labels",
            "ratio": round(float(skd.mean() / kd.mean()), 4),
            "difference": round(float(difference.mean()), 2),
            "stderr": round(float(difference.std(ddof=1) / len(runs) ** 0.5), 2) if len(runs) > 1 else None,
            "settings": {
                "seeds": args.seeds,
                "shared": args.shared is not None,
                "skd": skd.tolist(),
                "kd": kd.tolist(),
                "trainer": args.settings,
            },
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, CUDA {torch.cuda.is_available()}",
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
        }
        print(json.dumps(line))


if __name__ == "__main__":
    main()
