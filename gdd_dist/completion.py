"""Shell completion for all installed programs (gdd-train and others): ``eval "$(python -m gdd_dist.completion bash)"``."""

import argparse
import sys
from collections.abc import Callable, Sequence

import shtab

from gdd_dist import doctor, evaluate, export, status
from gdd_dist.config import command_line
from gdd_dist.config.bounds import options
from gdd_dist.runtime.arguments import Parser
from gdd_dist.runtime.run_program import run_program

DIRECTORIES, FILES = ("data", "out", "store", "dest"), ("config", "deepspeed_config")
PROGRAMS: dict[str, Callable[[], argparse.ArgumentParser]] = {
    "gdd-train": command_line.command_line,
    "gdd-evaluate": evaluate.parser,
    "gdd-export": export.parser,
    "gdd-status": status.parser,
    "gdd-doctor": doctor.parser,
}


def script(shell: str) -> str:
    """Return the completion script of all programs for a shell."""
    parts = []
    for name, make in PROGRAMS.items():
        parser = make()
        parser.prog = name
        choices = {option: f.metadata["choices"] for option, _, f in options()}
        for action in parser._actions:
            action.choices = action.choices or choices.get(action.dest)
            if action.dest in DIRECTORIES:
                action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
            elif action.dest in FILES:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
        parts.append(shtab.complete(parser, shell))
    return "\n".join(parts)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = Parser(
        prog="python -m gdd_dist.completion",
        example='eval "$(python -m gdd_dist.completion bash)"',
        description="Print a shell's completion script for gdd-train and the other programs.",
    )
    p.add_argument("shell", choices=shtab.SUPPORTED_SHELLS, help="which shell")
    return p


def main(argv: Sequence[str], _joined: object = None) -> None:
    """Print the script."""
    sys.stdout.write(f"{script(parser().parse_args(argv).shell)}\n")


if __name__ == "__main__":
    run_program(main, sys.argv[1:])
