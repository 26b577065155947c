"""The programs under the names that a wheel installs: gdd-train is `python -m gdd_dist.train`, and so on."""

from __future__ import annotations

import importlib
import sys

from gdd_dist.runtime.run_program import run_program


def _run(module: str) -> None:
    run_program(importlib.import_module(f"gdd_dist.{module}").main, sys.argv[1:])


def train() -> None:
    """gdd-train; under torchrun: torchrun --no-python … gdd-train."""
    _run("train")


def evaluate() -> None:
    """gdd-evaluate."""
    _run("evaluate")


def export() -> None:
    """gdd-export."""
    _run("export")


def status() -> None:
    """gdd-status."""
    _run("status")


def doctor() -> None:
    """gdd-doctor."""
    _run("doctor")


def shards() -> None:
    """gdd-shards: python -m sharding."""
    from sharding.__main__ import main

    sys.exit(main())
