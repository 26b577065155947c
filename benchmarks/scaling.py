"""Where the time of gan and matching steps goes at 1, 2, 4, 8 ranks on this host, and the bytes they send, by formula and counted.

    python benchmarks/scaling.py [--ranks 1 2 4 8] [--rounds 3] [--data DATA] [-- trainer settings]
    python benchmarks/scaling.py --project    # the tables of docs/scaling.md

Runs the real steps of gdd_dist.train under torchrun, numbers of ranks in turn, round after round. In each run blocks of steps take
turns that exchange gradients and that do not (DDP's no_sync, no vote):

    data            waited for the next batch
    compute         a step that exchanges nothing, less its wait for data
    communication   what a step that exchanges takes longer: what is not hidden behind compute, waiting for the slowest rank included

Bytes are those that the kernel counted on the ranks' TCP connections, retransmissions off, in the blocks that exchange; the formula is
projection.sent_by_a_rank. Prints a JSON line for each step and number of ranks; `ours` is images/s, `other` one rank's with all cores.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from common import line
from made_up import jpegs
from projection import parameters, payload, sent_by_a_rank, tables
from torch.nn.parallel import DistributedDataParallel
from wire import bytes_sent

from gdd_dist import train
from gdd_dist.engines.ddp import DDPEngine
from gdd_dist.runtime import monitor
from gdd_dist.runtime.groups import Vote
from gdd_dist.runtime.run_program import run_program
from gdd_dist.runtime.world import World
from gdd_dist.training import loop

WARM, BLOCK, PAIRS = 4, 4, 3
"""First steps, which pay for first calls; steps of a block; pairs of blocks."""
STEPS = WARM + 2 * BLOCK * PAIRS
BATCH = 16
STEP_NAMES = ("gan", "matching")
SMALL = (
    "--preset tiny-imagenet --precision float32 --checkpoint_seconds 1000000 --teachers.architectures convnet:16 --teachers.seeds 1 "
    f"--teachers.snapshots 1 --teachers.epochs 1 --logits.views 2 --gan.steps {STEPS} --gan.batch {BATCH} --gan.width 192 "
    f"--gan.d_width 192 --gan.blocks 1 --gan.d_blocks 1 --gan.patch 8 --matching.steps {STEPS} --matching.interval {STEPS} "
    f"--matching.batch {BATCH} --matching.group 2 --matching.quick_students 1 --matching.quick_steps 1 --matching.quick_student convnet:8"
)


class Probe(loop.Watcher):
    """Sits inside a rank of gdd_dist.train: times its steps, and keeps it from exchanging anything in every second block."""

    def __init__(self, results: Path) -> None:
        self._results, self._silent = results, False
        self._silence()

    def _silence(self) -> None:
        """From now on engines and votes exchange nothing while ``_silent``: the one thing that the trainer has no switch for."""
        forward, vote, probe = DDPEngine.__call__, World.vote, self

        def of_engine(engine: DDPEngine, *inputs: Any) -> Any:
            net = engine._wrapped
            silent = probe._silent and isinstance(net, DistributedDataParallel)
            with net.no_sync() if silent else contextlib.nullcontext():
                return forward(engine, *inputs)

        def of_world(world: World, save: bool = False) -> Vote:
            return Vote(0, save, 1) if probe._silent else vote(world, save)

        DDPEngine.__call__, World.vote = of_engine, of_world
        monitor.EVERY_STEP_UNTIL = 0  # scalars are exchanged at a few steps only

    def batches(self, trainee: Any, start: int, batches: Iterator[Any]) -> Iterator[Any]:
        """Of gan and matching: measures block after block, and writes what it found when the batches are used up."""
        return self._timed(trainee, batches) if trainee.name in STEP_NAMES else batches

    def _timed(self, trainee: Any, batches: Iterator[Any]) -> Iterator[Any]:
        world, port = trainee._ctx.world, int(os.environ["MASTER_PORT"])
        yield from (next(batches) for _ in range(WARM))
        blocks = []
        for number in range(2 * PAIRS):
            self._silent = number % 2 == 1
            world.barrier()
            sent, begin, waited = bytes_sent(port), time.perf_counter(), 0.0
            for _ in range(BLOCK):
                before = time.perf_counter()
                batch = next(batches)
                waited += time.perf_counter() - before
                yield batch
            spent = time.perf_counter() - begin
            world.barrier()  # what was sent has arrived
            blocks.append([spent / BLOCK, waited / BLOCK, (bytes_sent(port) - sent) / BLOCK])
        self._silent = False
        nets = {"generator": trainee.nets.generator, "discriminator": trainee.nets.discriminator}
        found = {"blocks": blocks, **{name: parameters(net) for name, net in nets.items()}}
        (self._results / f"{trainee.name}-{world.rank}.json").write_text(json.dumps(found))


def parts(folder: Path, step: str, ranks: int) -> dict[str, float]:
    """Means over ranks and blocks of one run: seconds in all and of each part, bytes that all ranks sent in a step."""
    found = [json.loads((folder / f"{step}-{r}.json").read_text()) for r in range(ranks)]
    blocks = np.array([f["blocks"] for f in found])  # [ranks, blocks, (seconds, seconds waited for data, bytes sent)]
    exchanging, silent = blocks[:, ::2].mean((0, 1)), blocks[:, 1::2].mean((0, 1))
    compute = silent[0] - silent[1]
    return {
        "step": exchanging[0],
        "compute": compute,
        "data": exchanging[1],
        "communication": exchanging[0] - exchanging[1] - compute,
        "counted": exchanging[2] * ranks,
        "formula": sent_by_a_rank(payload(found[0]["generator"], found[0]["discriminator"]), ranks) * ranks,
    }


def launch(ranks: int, argv: list[str], results: Path | None = None) -> None:
    """gdd_dist.train under torchrun, with a probe in each rank where there is a folder for its ``results``."""
    program = ["-m", "gdd_dist.train"] if results is None else [__file__, "--rank-of", str(results), "--"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *program]
    subprocess.run([*command, *argv], check=True, stdout=sys.stderr)


def measure(args: argparse.Namespace, scratch: Path) -> dict[tuple[str, int], list[dict[str, float]]]:
    """(step, ranks) → what each round found."""
    data = args.data or jpegs(scratch, 1000)
    argv = ["--data", str(data), *SMALL.split(), *args.settings]
    launch(1, [*argv, "--out", str(scratch / "base"), "--until", "logits"])
    found: dict[tuple[str, int], list[dict[str, float]]] = {(s, n): [] for s in STEP_NAMES for n in args.ranks}
    for number in range(args.rounds):
        for ranks in args.ranks:
            out = scratch / f"run-{number}-{ranks}"
            for step in ("teachers", "logits"):
                shutil.copytree(scratch / "base" / step, out / step, symlinks=True)
            launch(ranks, [*argv, "--out", str(out), "--until", "matching"], out)
            for step in STEP_NAMES:
                found[step, ranks].append(parts(out, step, ranks))
            shutil.rmtree(out)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--ranks", type=int, nargs="+", default=[1, 2, 4, 8], help="ranks on this host (default 1 2 4 8)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="how often each is run (default 3)")
    parser.add_argument(
        "--data", type=Path, help="a data set of python -m sharding build (default: made-up 64x64 images)"
    )
    parser.add_argument("--project", action="store_true", help="print the tables of docs/scaling.md and end")
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("settings", nargs="*", help="settings of gdd_dist.train, after --")
    args = parser.parse_args()
    if args.project:
        print(tables(), end="")
        return
    if args.rank_of:
        loop.watchers.append(Probe(args.rank_of))
        run_program(train.main, args.settings)
    with tempfile.TemporaryDirectory(prefix="gdd-scaling-") as folder:
        found = measure(args, Path(folder))
    for (step, ranks), rounds in found.items():
        rate, one = (np.array([BATCH / r["step"] for r in found[step, n]]) for n in (ranks, args.ranks[0]))
        median = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
        settings = {"ranks": ranks, "batch": BATCH, "steps": BLOCK * PAIRS, "trainer": [*SMALL.split(), *args.settings]}
        text = line(f"scaling/{step}", rate, {f"{args.ranks[0]} ranks": one}, "images/s", settings)
        seconds = {name: round(median[name], 4) for name in ("step", "compute", "data", "communication")}
        sent = {"formula": round(median["formula"]), "counted": round(median["counted"])}
        print(json.dumps({**text, "seconds_a_step": seconds, "bytes_sent_a_step": sent}), flush=True)


if __name__ == "__main__":
    main()
