"""Patterns that name the tars of a data set, split by split."""

import re
from collections import Counter
from glob import glob
from pathlib import Path

from braceexpand import braceexpand

from sharding.errors import UserError
from sharding.manifest import SPLITS
from sharding.tars import shown

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_SPLIT = re.compile(rf",(?=(?:{'|'.join(SPLITS)})=)")


def split_patterns(argument: str) -> dict[str, str]:
    """SPLIT → pattern, from ``train=PATTERN,test=PATTERN`` or one pattern (train). Raises UserError for anything else."""
    parts = _SPLIT.split(argument)
    if not any(part.startswith(f"{split}=") for part in parts for split in SPLITS):
        return {"train": _local(argument)}
    patterns = {split: _local(pattern) for split, _, pattern in (part.partition("=") for part in parts)}
    if "train" not in patterns or len(patterns) < len(parts) or not all(patterns.values()):
        raise UserError(f"webdataset:{argument} does not name each split once; write webdataset:train=GLOB,test=GLOB")
    return patterns


def parts(pattern: str) -> list[str]:
    """The patterns of a list ``a::b``, as stock webdataset writes them."""
    return [pattern] if Path(pattern).exists() else pattern.split("::")


def _local(pattern: str) -> str:
    """Refuse commands and URLs: stock webdataset hands pipe:, and many other schemes, to a shell."""
    pattern = pattern.strip()
    for part in parts(pattern):
        if part.lower().startswith("pipe:") or part.startswith(("|", "!")):
            raise UserError(f"{shown(part)} is a command, and commands are never run; give the paths of tar files")
        # The name of a local file may also contain a colon.
        if "://" in part or (_SCHEME.match(part) and not any(map(_matches, _names(part)))):
            raise UserError(f"{shown(part)} is a URL; download the tars and give their paths (no such file exists)")
    return pattern


def tars(pattern: str, left_out: Counter[str] | None = None) -> list[Path]:
    """The tars of directories, or those that patterns with braces and asterisks name, sorted within each brace.

    Other files of a directory are counted in `left_out`. Raises UserError when there are no tars, or one is missing.
    """
    paths, left_out = list[Path](), Counter() if left_out is None else left_out
    for part in parts(pattern):
        if Path(part).is_dir():
            inside = sorted(Path(part).iterdir())
            paths += (found := [path for path in inside if path.suffix == ".tar"])
            if not found:
                raise UserError(f"{part} holds no .tar; give a directory of tars or a pattern")
            for path in {*inside} - {*found}:
                kind = "directories" if path.is_dir() else f"{shown(path.suffix) or 'other'} files"
                left_out[f"{kind} beside the tars"] += 1
            continue
        for name in _names(part):
            matches = _matches(name)
            if not matches and any(c in name for c in "*?["):
                raise UserError(f"{name} matches no file; check the pattern")
            paths += map(Path, matches or [name])
    for path in paths:
        if not path.is_file():
            what = "is a directory, a pipe or a device" if path.exists() else "does not exist"
            raise UserError(f"{path} {what}; check the pattern")
    return [path.absolute() for path in paths]


def _names(pattern: str) -> list[str]:
    """The names, or patterns with asterisks, that a pattern with braces stands for."""
    try:
        return list(braceexpand(pattern))
    except ValueError as error:
        raise UserError(f"{pattern} is not a pattern ({error}); write it as shards-{{000..123}}.tar") from None


def _matches(name: str) -> list[str]:
    """The file of that name, or those that it matches."""
    return [name] if Path(name).exists() else sorted(glob(name, recursive=True))
