"""The share of a teacher's and a GAN's steps spent waiting for data: fed by stock webdataset, by ours, by ours with decoded images kept.

    python benchmarks/waiting.py [--data DATA] [--ranks 2 8] [-- trainer settings]

Runs the real steps of gdd_dist.train under torchrun; what is timed is `next` on the batches of each rank, after the first few steps.
Stock webdataset reads in the step's own process, as a loop over its loader without workers does. Prints one JSON line for each step and
number of ranks; `ours` is the share of time that is not waited, `ratio` that share over stock webdataset's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import line
from made_up import jpegs

from gdd_dist import train
from gdd_dist.runtime.run_program import run_program
from gdd_dist.steps import gan
from gdd_dist.training import loop

MODES = {"stock webdataset": "none", "streaming": "none", "resident": "ram"}
SKIPPED = 5
"""First steps, which pay for first calls."""
SMALL = (
    "--preset tiny-imagenet --teachers.architectures convnet:16 --teachers.seeds 1 --teachers.snapshots 1 --teachers.epochs 1 "
    "--teachers.batch 64 --logits.views 1 --gan.steps 30 --gan.batch 64 --gan.width 16 --gan.d_width 16 --gan.blocks 1 "
    "--gan.d_blocks 1 --gan.patch 4 --until gan"
)


def stock(data: Path, batch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of stock webdataset, uint8 [B, C, H, W] and labels, endlessly."""
    import webdataset as wds

    urls = sorted(str(p) for p in (data / "train").glob("*.tar"))
    stages = wds.WebDataset(urls, shardshuffle=False, nodesplitter=None, empty_check=False).decode("rgb8")
    for images, labels in stages.to_tuple("jpg;png;webp", "cls").batched(batch).repeat():
        if len(labels) == batch:
            yield torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), torch.as_tensor(labels)


class Waits(loop.Watcher):
    """Writes (seconds waited, seconds in all) of this rank when a loop's batches are used up."""

    def __init__(self, mode: str, data: Path, results: Path) -> None:
        self._mode, self._data, self._results = mode, data, results

    def batches(self, trainee: Any, start: int, batches: Iterator[Any]) -> Iterator[Any]:
        """The loop's own, or stock webdataset's in their place."""
        step = trainee.name.partition(":")[0]
        if self._mode == "stock webdataset":
            batches = self._stock(trainee.read(start), trainee.steps - start)
        waited, begin = 0.0, time.perf_counter()
        for number in range(start, trainee.steps):
            if number == start + SKIPPED:
                waited, begin = 0.0, time.perf_counter()
            before = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - before
            yield batch
        with (self._results / f"{step}.txt").open("a") as stream:
            stream.write(f"{waited} {time.perf_counter() - begin}\n")

    def _stock(self, first: Any, steps: int) -> Iterator[Any]:
        """``first``, a batch of the teachers' or the GAN's, with stock webdataset's images and labels in place of its own."""
        of_gan = isinstance(first, gan.Batch)
        for images, labels in islice(stock(self._data, len(first.labels if of_gan else first[1])), steps):
            if of_gan:
                yield first._replace(labels=labels, real=first.real._replace(images=images))
            else:
                yield (images, labels, *first[2:])


def rank(mode: str, data: Path, results: Path, argv: list[str]) -> None:
    """A rank of the run, its batches timed."""
    loop.watchers.append(Waits(mode, data, results))
    run_program(train.main, argv)


def shares(mode: str, data: Path, ranks: int, settings: list[str]) -> dict[str, float]:
    """Step → share of its time that its ranks wait for data."""
    with tempfile.TemporaryDirectory(prefix="gdd-waiting-") as folder:
        results = Path(folder)
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", __file__]
        pool = ["--teachers.seeds", str(ranks)]  # so that all ranks train a teacher
        argv = [
            "--data",
            str(data),
            "--out",
            str(results / "out"),
            "--loader.resident",
            MODES[mode],
            *SMALL.split(),
            *pool,
        ]
        command = [*launch, "--rank-of", mode, str(data), str(results), "--", *argv, *settings]
        subprocess.run(command, check=True, stdout=sys.stderr)
        found = {}
        for path in results.glob("*.txt"):
            waited, total = np.loadtxt(path, ndmin=2).sum(0)
            found[path.stem] = float(waited / total)
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, help="a data set of python -m sharding build (default: 2,000 made-up images)"
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 8], help="ranks on this host (default 2 8)")
    parser.add_argument("--rank-of", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("settings", nargs="*", help="settings of gdd_dist.train, after --")
    args = parser.parse_args()
    if args.rank_of:
        mode, data, results = args.rank_of
        rank(mode, Path(data), Path(results), args.settings)
    with tempfile.TemporaryDirectory(prefix="gdd-benchmark-") as scratch:
        data = args.data or jpegs(Path(scratch), 2000)
        for ranks in args.ranks:
            found = {mode: shares(mode, data, ranks, args.settings) for mode in MODES}
            for step in ("teachers", "gan"):
                waited = {mode: found[mode][step] for mode in MODES}
                busy = {mode: np.array([1 - share]) for mode, share in waited.items()}
                settings = {"ranks": ranks, "data": args.data.name if args.data else "made up", "step": step}
                text = line(
                    f"waiting/{step}",
                    busy["streaming"],
                    {"stock webdataset": busy["stock webdataset"]},
                    "share",
                    settings,
                )
                text = {
                    **text,
                    "ours": float(busy["streaming"][0]),
                    "other": {"stock webdataset": float(busy["stock webdataset"][0])},
                }
                print(json.dumps({**text, "waiting": {m: round(s, 4) for m, s in waited.items()}}), flush=True)


if __name__ == "__main__":
    main()
