"""Labelled images → tar shards with an index, a manifest and checksums. Knows nothing of training."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from sharding.interrupts import end_silently, started

__version__ = "0.1.0"

if started(sys.argv, sys.orig_argv):  # before the slow imports of the program
    end_silently()

if TYPE_CHECKING:
    from sharding.manifest import Manifest


def build_digits(dest: Path | str, log: Callable[[str], None] | None = None) -> Manifest:
    """Build scikit-learn's digits in `dest`, or continue an unfinished build there; returns the manifest.

    Does nothing when they are there already. Raises UserError when `dest` holds anything else.
    """
    # Imported here, because programs that only read shards do not need the modules that build them.
    from sharding.writer import build

    return build("digits", dest, log=log).manifest
