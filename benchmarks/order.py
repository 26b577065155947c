"""What the order function costs at scale, by simulation: 10^9 samples in 10^6 shards over 4,096 ranks.

    python benchmarks/order.py [--samples 1000000000] [--shards 1000000] [--ranks 4096] [--share 4]

One rank of the simulated ones, in this process: seconds until its first batch, seconds for a batch at an arbitrary step of an
arbitrary epoch (a resume), seconds for each further batch, and the memory that the order takes. Prints JSON lines; `ratio` is the
limit (one second, 100 MB) over what was measured, so more than 1 keeps it.
"""

from __future__ import annotations

import argparse
import json
import resource
import time

import numpy as np
from common import line

from gdd_dist.data.order import Order

SECONDS, MEGABYTES = 1.0, 100.0


def shard_sizes(samples: int, shards: int) -> tuple[int, ...]:
    """Shards of about equal size, no two neighbours alike."""
    edges = np.linspace(0, samples, shards + 1).astype(np.int64)
    return tuple(np.diff(edges).tolist())


def peak() -> float:
    """This process's peak memory in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=10**9)
    parser.add_argument("--shards", type=int, default=10**6)
    parser.add_argument("--ranks", type=int, default=4096)
    parser.add_argument("--share", type=int, default=4, help="samples a batch for each rank (default 4)")
    args = parser.parse_args()
    Order((50, 50), 10, 10, 0).batch(0)  # imports and first calls are not the order's
    before = peak()
    sizes, memory = shard_sizes(args.samples, args.shards), 0.0
    rng, found = np.random.default_rng(0), {"start-up": [], "resume": [], "batch": []}
    for rank in rng.integers(0, args.ranks, 5).tolist():
        begin = time.perf_counter()
        order = Order(sizes, args.ranks * args.share, args.ranks, 0)
        order.batch(0, rank, args.ranks)
        found["start-up"].append(time.perf_counter() - begin)
        begin = time.perf_counter()
        step = int(rng.integers(0, 50 * order.steps_per_epoch))
        order.batch(step, rank, args.ranks)
        found["resume"].append(time.perf_counter() - begin)
        begin = time.perf_counter()
        for further in range(step + 1, step + 1001):
            order.batch(further, rank, args.ranks)
        found["batch"].append((time.perf_counter() - begin) / 1000)
        memory = memory or peak() - before  # of one rank: the others are simulated in its place
    settings = vars(args)
    for name, seconds in found.items():
        values = np.array(seconds)
        text = line(f"order/{name}", 1 / values, {"limit": np.full(len(values), 1 / SECONDS)}, "1/s", settings)
        print(json.dumps({**text, "seconds": [round(s, 6) for s in seconds]}))
    text = line("order/memory", np.array([1 / memory]), {"limit": np.array([1 / MEGABYTES])}, "1/MB", settings)
    print(json.dumps({**text, "ours": round(1 / memory, 5), "megabytes": round(memory, 1)}))


if __name__ == "__main__":
    main()
