"""The library versions and the commit of this project that computed a result."""

from __future__ import annotations

import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from gdd_dist import __version__

PACKAGES = ("gdd_dist", "torch", "torchvision", "numpy")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that influence results."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # a copy of the source tree that is not installed
        if name != "gdd_dist":
            raise
        return __version__


@cache
def commit() -> str | None:
    """Return the commit of the checkout in which this file is tracked, or None."""
    here = Path(__file__)
    if _git(here.parent, "ls-files", "--error-unmatch", here.name) is None:  # installed, maybe in another checkout
        return None
    return _git(here.parent, "rev-parse", "--verify", "HEAD")


def changed() -> bool:
    """Whether tracked files differ from the commit."""
    return bool(commit() and _git(Path(__file__).parent, "status", "--porcelain", "--untracked-files=no"))


def _git(directory: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=directory, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
