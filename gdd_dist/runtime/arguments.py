"""What the small programs' command lines share."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from gdd_dist import __version__
from sharding.errors import UserError


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one ``error:`` line, as all programs here do, instead of printing its usage."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_argument("--version", action="version", version=f"gdd_dist {__version__}")

    def error(self, message: str) -> NoReturn:
        """Raise UserError."""
        raise UserError(f"{message}; see --help")
