"""Memory of a rank that trains a wide generator under DDP and each ZeRO stage, and the bytes it sends: measured, on CPUs.

    python benchmarks/memory.py [--ranks 2 4] [--width 1536] [--bucket NUMBERS]
    python benchmarks/memory.py --table benchmarks/results/memory.jsonl    # the table of docs/engines.md

Every engine runs in processes of its own. What counts is anonymous resident memory (the kernel's VmRSS and VmHWM less pages of files)
above that of the same process when it has built, used and closed the same engine with a tiny network, so that libraries do not count:
`kept` after a step, `peak` during the next. The peak holds gradients, communication buffers and activations; those of one small image a
rank are a fraction of a wide network's weights. Each freed block goes back to the kernel at once (MALLOC_MMAP_THRESHOLD_).

Prints a JSON line for each engine and number of ranks, in bytes a weight; `ours` is the engine's peak, `ratio` DDP's over it.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import machine, versions
from engines import KINDS, build
from projection import parameters
from wire import bytes_sent

from gdd_dist.engines.interface import Engine
from gdd_dist.models.generator import Generator
from gdd_dist.runtime.memory import peak_memory, reset_peak
from gdd_dist.runtime.versions import commit
from gdd_dist.runtime.world import World

SIZE, BLOCKS = 16, 2


def generator(width: int) -> Generator:
    """For images of 16 pixels and 10 classes."""
    return Generator(classes=10, channels=3, size=SIZE, width=width, blocks=BLOCKS)


def step(engine: Engine) -> None:
    """One step of Adam on one image a rank."""
    labels = torch.zeros(1, dtype=torch.int64)
    images = engine(torch.ones(1, 64), labels)
    engine.backward((images * torch.ones_like(images)).sum())
    engine.step(1e-4)


def anonymous(world: World) -> int:
    """Bytes of this rank's memory that belong to no file, once all it can give back is."""
    gc.collect()
    reset_peak(world.device)
    return peak_memory(world.device)


def of_rank(kind: str, width: int, bucket: int) -> dict[str, int]:
    """What one rank measures: bytes kept and at the peak, sent in a step; parameters."""
    world = World("cpu").join()
    tiny = build(generator(16), world, kind, "float32", bucket)
    step(tiny)
    tiny.close()
    del tiny
    base = anonymous(world)
    net = generator(width)
    numbers = parameters(net)  # ZeRO 3 cuts them
    engine = build(net, world, kind, "float32", bucket)
    step(engine)
    kept = anonymous(world) - base
    world.barrier()
    sent = bytes_sent(int(os.environ["MASTER_PORT"]))
    step(engine)
    peak = peak_memory(world.device) - base
    world.barrier()
    sent = bytes_sent(int(os.environ["MASTER_PORT"])) - sent
    everyone = world.gather([kept, peak, sent])
    engine.close()
    world.close()
    kept, peak, sent = (max(column) for column in zip(*everyone, strict=True))
    return {"parameters": numbers, "kept": kept, "peak": peak, "sent": sent}


def measure(kind: str, ranks: int, args: argparse.Namespace) -> dict[str, Any]:
    """One engine on so many ranks: the largest figures of any rank."""
    with tempfile.TemporaryDirectory(prefix="gdd-memory-") as folder:
        result = Path(folder) / "result.json"
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", __file__]
        options = ["--width", str(args.width), "--bucket", str(args.bucket), "--rank-of", kind, str(result)]
        env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
        subprocess.run([*launch, *options], check=True, stdout=sys.stderr, env=env)
        found: dict[str, Any] = json.loads(result.read_text())
        return found


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Markdown, from the JSON lines."""
    numbers = lines[0]["settings"]["parameters"]
    text = [
        f"Generator of {numbers:,} weights ({4 * numbers / 1e6:.0f} MB), bytes a weight on a rank, largest rank:",
        "",
        "| ranks | engine | kept between steps | peak in a step | peak, MB | sent in a step |",
        "|---|---|---|---|---|---|",
    ]
    for one in lines:
        kept, peak, sent = (one["bytes_a_weight"][k] for k in ("kept", "peak", "sent"))
        name = one["benchmark"].partition("/")[2].replace("_", " ").replace("zero", "ZeRO")
        text.append(
            f"| {one['settings']['ranks']} | {name} | {kept:.1f} | {peak:.1f} | {peak * numbers / 1e6:,.0f} | {sent:.1f} |"
        )
    return "\n".join(text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="ranks on this host (default 2 4)")
    parser.add_argument(
        "--width", type=int, default=1536, help="channels of the generator (default 1536: 60 million weights)"
    )
    parser.add_argument(
        "--bucket",
        type=int,
        default=0,
        help="numbers in DeepSpeed's buckets (default 0: the trainer's, 25 MiB)",
    )
    parser.add_argument("--table", type=Path, help="print these JSON lines as a table and end")
    parser.add_argument("--rank-of", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.table:
        print(table([json.loads(text) for text in args.table.read_text().splitlines()]), end="")
    elif args.rank_of:
        found = of_rank(args.rank_of[0], args.width, args.bucket)
        if os.environ["RANK"] == "0":
            Path(args.rank_of[1]).write_text(json.dumps(found))
    else:
        for ranks in args.ranks:
            report(ranks, {kind: measure(kind, ranks, args) for kind in KINDS}, args)


def report(ranks: int, found: dict[str, dict[str, Any]], args: argparse.Namespace) -> None:
    """Print one line an engine."""
    for kind, one in found.items():
        numbers = one["parameters"]
        a_weight = {name: round(one[name] / numbers, 2) for name in ("kept", "peak", "sent")}
        of_ddp = round(found["ddp"]["peak"] / numbers, 2)
        line = {
            "benchmark": f"memory/{kind}",
            "ours": a_weight["peak"],
            "other": {"ddp": of_ddp},
            "unit": "bytes a weight",
            "ratio": round(of_ddp / a_weight["peak"], 3),
            "bytes_a_weight": a_weight,
            "settings": {
                "ranks": ranks,
                "width": args.width,
                "bucket": args.bucket,
                "size": SIZE,
                "parameters": numbers,
            },
            "machine": machine(),
            "versions": versions("torch", "deepspeed"),
            "commit": commit(),
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
