"""Everything that a first GPU should say, in one command: `python benchmarks/gpu.py OUT [--device cpu] [--source cifar10:FILE]`.

Each phase is a process of its own with a deadline: one that hangs is killed, the others go on. Neighbours that measure no time run side by
side, as many as there are four cores for. What a phase finds is appended to
OUT/gpu.jsonl as JSON lines, each flushed to the disk, and ended by a line with its `status`: ok, failed, late or no time. Ends with 1 where any
phase is not ok; a phase that finds nothing has failed. On a CPU all phases run too, on small sizes: a rehearsal.

    --source          images for the shards, as `python -m sharding build` takes them; without it made-up ones in CIFAR-10's own format
    --call 1, 2       the two halves that together fit a quarter of an hour of a machine that is lent (benchmarks/README.md)
    --phases NAME …   only these (`--list` names them)
    --minutes N       for all phases together (default 14); phase `run` takes what is left
    --before FILE     the first call's gpu.jsonl: phase `run` sizes its run by the rates in it
    --settings …      settings of gdd_dist.train for phase `run`, up to the end of the line
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]  # a copy of the tree that nobody installed

from gpu_phases import CALLS, PHASES, Task  # noqa: E402

RECORD = "gpu.jsonl"
GRACE = 20.0
"""Seconds of the whole time that are left for ending, so that what was found comes back."""
REHEARSAL = 10
"""How much longer a CPU may take, on which other jobs may run."""


def main() -> int:
    """The phases in turn, or inside one of their processes that phase."""
    args = parser().parse_args()
    if args.list:
        print("\n".join(f"{name:22}{phase.seconds:5.0f} s  {phase.what}" for name, phase in PHASES.items()))
        return 0
    out = args.out.resolve()
    if args.phase:
        task = Task(out, args.device, args.source, args.seconds, args.before, tuple(args.settings))
        for line in PHASES[args.phase].run(task):
            print(json.dumps(line), flush=True)
        return 0
    out.mkdir(parents=True, exist_ok=True)
    names = args.phases or (CALLS[args.call] if args.call else list(PHASES))
    end, failed = time.monotonic() + 60 * args.minutes - GRACE, list[str]()

    def tried(name: str) -> bool:
        left = end - time.monotonic()
        seconds = PHASES[name].seconds * (REHEARSAL if args.device == "cpu" else 1)
        limit = left if name == "run" else min(seconds, left)
        if limit <= 0:
            write(out, {"phase": name, "status": "no time"})
        return limit > 0 and attempt(out, name, limit, command(name, limit, args)) == "ok"

    for timed, group in itertools.groupby(names, lambda name: PHASES[name].timed):
        with ThreadPoolExecutor(1 if timed else max(1, (os.cpu_count() or 1) // 4)) as beside:
            phases = list(group)
            failed += [name for name, ok in zip(phases, beside.map(tried, phases), strict=True) if not ok]
    print(
        f"{len(names) - len(failed)} phases ok; not ok: {', '.join(failed) or 'none'}; {out / RECORD}", file=sys.stderr
    )
    return int(bool(failed))


def command(name: str, limit: float, args: argparse.Namespace) -> list[str]:
    """What starts the process of a phase."""
    given = [f"--{key}={value}" for key in ("source", "before") if (value := getattr(args, key))]
    own = ["--phase", name, "--device", args.device, f"--seconds={limit}", *given, "--settings", *args.settings]
    return [sys.executable, __file__, str(args.out.resolve()), *own]


def attempt(out: Path, name: str, limit: float, command: Sequence[str]) -> str:
    """A phase in a process of its own, killed with all that it started after ``limit`` seconds; ok, failed or late.

    The JSON lines that it prints are kept as they come.
    """
    print(f"{name}: at most {limit:.0f} s", file=sys.stderr, flush=True)
    begin, rest, found, log = time.monotonic(), b"", 0, out / f"{name.replace('/', '-')}.log"
    with log.open("wb") as errors:
        env = {"GOMP_SPINCOUNT": "1000", **os.environ}  # as the product sets it: phases run side by side
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, start_new_session=True, env=env)
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        ended = False
        while not ended:
            time.sleep(0.05)
            late = time.monotonic() - begin > limit
            if late and process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            ended = process.poll() is not None or late
            *lines, rest = (rest + (process.stdout.read() or b"")).split(b"\n")
            for line in lines:
                if line.startswith(b"{"):
                    write(out, {"phase": name, **json.loads(line)})
                    found += 1
        code = process.wait()
    status = "late" if late else "ok" if code == 0 and found else "failed"
    error = {} if status == "ok" else {"returncode": code, "error": log.read_text(errors="replace")[-1500:]}
    write(out, {"phase": name, "status": status, "seconds": round(time.monotonic() - begin, 1), **error})
    print(f"{name}: {status}", file=sys.stderr, flush=True)
    return status


def write(out: Path, line: dict[str, Any]) -> None:
    """A line of the record, on the disk when it returns."""
    with (out / RECORD).open("a") as f:
        f.write(f"{json.dumps(line)}\n")
        f.flush()
        os.fsync(f.fileno())


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("out", type=Path, metavar="OUT")
    made.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    made.add_argument("--source", help="images for the shards (default: made-up ones in CIFAR-10's format)")
    made.add_argument("--call", choices=CALLS, help="one half of the phases")
    made.add_argument("--before", type=Path, metavar="FILE", help="the first call's gpu.jsonl")
    made.add_argument("--phases", nargs="+", choices=PHASES, metavar="NAME", help="only these, in this order")
    made.add_argument("--minutes", type=float, default=14.0, help="for all together (default 14)")
    made.add_argument("--list", action="store_true", help="name the phases and end")
    made.add_argument("--phase", choices=PHASES, help=argparse.SUPPRESS)
    made.add_argument("--seconds", type=float, default=600.0, help=argparse.SUPPRESS)
    made.add_argument(
        "--settings", nargs=argparse.REMAINDER, default=[], help="settings of gdd_dist.train for phase run"
    )
    return made


if __name__ == "__main__":
    sys.exit(main())
