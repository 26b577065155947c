"""Search matching's settings with Ray Tune: python tune/search.py (or, installed, python -m tune.search)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    if not __package__:  # as a script: what it imports lies beside its directory, not in it
        sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from sharding.interrupts import end_silently

    end_silently()

from gdd_dist.runtime.run_program import run_program
from gdd_dist.runtime.signals import asked
from tune import environment
from tune.options import parse

UNWINDING = 60.0
"""Seconds for Ray to end its processes after an interrupt; on a busy machine it takes many."""


def main(argv: list[str], joined: Callable[[Any], None]) -> None:
    """Run what the command line asks for."""
    search = parse(argv)
    environment.prepare(search.options.address)
    from tune import driver  # Ray reads the environment as it is imported

    asked.unwinding, asked.remedy = UNWINDING, "run the same command with --resume to continue"
    try:
        driver.run(search)
    except KeyboardInterrupt:
        sys.stderr.write(f"stopped: interrupted; {asked.remedy}\n")
        raise SystemExit(130) from None


if __name__ == "__main__":
    run_program(main, sys.argv[1:])
