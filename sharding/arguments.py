"""What the command lines of all programs here share."""

import argparse
from typing import Any, NoReturn

from sharding.errors import UserError


class Parser(argparse.ArgumentParser):
    """Its help begins with an example. What is wrong becomes one line, as in all programs here, instead of the usage."""

    def __init__(self, *, example: str = "", **options: Any) -> None:
        super().__init__(**options)
        self._example = example

    def format_help(self) -> str:
        """As argparse, under a line that can be typed as it is."""
        return (f"example: {self._example}\n\n" if self._example else "") + super().format_help()

    def error(self, message: str) -> NoReturn:
        """Raise UserError."""
        raise UserError(f"{message}; see {self.prog} --help")
