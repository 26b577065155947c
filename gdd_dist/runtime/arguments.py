"""What the small programs' command lines share."""

from __future__ import annotations

import argparse
from typing import NoReturn

from sharding.errors import UserError


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one ``error:`` line, as all programs here do, instead of printing its usage."""

    def error(self, message: str) -> NoReturn:
        """Raise UserError."""
        raise UserError(f"{message}; see --help")
