"""What the command lines of the small programs share."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

from gdd_dist import __version__
from sharding import arguments


class Parser(arguments.Parser):
    """A parser with ``--version`` that expands ``~`` in every value."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_argument("--version", action="version", version=f"gdd_dist {__version__}")

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse as argparse does; ``~`` is also expanded after ``=``, where shells do not expand it."""
        given = sys.argv[1:] if args is None else args
        split = [a.partition("=") if a.startswith("--") else ("", "", a) for a in given]
        return super().parse_args([name + eq + os.path.expanduser(value) for name, eq, value in split], namespace)
