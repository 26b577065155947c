"""The programs under the names that a wheel installs: gdd-train is `python -m gdd_dist.train`, and so on."""

import importlib
import sys
from functools import partial

from sharding.interrupts import end_silently, raise_again


def _run(module: str) -> None:
    end_silently()
    from gdd_dist.runtime.run_program import run_program

    run_program(importlib.import_module(f"gdd_dist.{module}").main, sys.argv[1:])


train = partial(_run, "train")  # with torchrun: torchrun --no-python … gdd-train
evaluate = partial(_run, "evaluate")
export = partial(_run, "export")
status = partial(_run, "status")
doctor = partial(_run, "doctor")


def shards() -> None:
    """gdd-shards: python -m sharding."""
    end_silently()
    from sharding.__main__ import main

    raise_again()
    sys.exit(main())
