"""What the command lines of all programs here share."""

import argparse
from typing import Any, NoReturn

from sharding.errors import UserError


class Parser(argparse.ArgumentParser):
    """A parser whose help begins with an example, and whose errors are one-line UserErrors instead of the usage text."""

    def __init__(self, *, example: str, **options: Any) -> None:
        super().__init__(**options)
        self._example = example

    def format_help(self) -> str:
        """Return argparse's help with the example command above it."""
        return f"example: {self._example}\n\n{super().format_help()}"

    def error(self, message: str) -> NoReturn:
        """Raise UserError."""
        raise UserError(f"{message}; see {self.prog} --help")
