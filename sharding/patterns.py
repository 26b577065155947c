"""Patterns that name the tars of a data set, split by split."""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from glob import glob
from itertools import islice
from pathlib import Path
from shlex import quote

from braceexpand import braceexpand

from sharding.errors import UserError
from sharding.folders import few, split_in
from sharding.kinds import HIDDEN
from sharding.manifest import SPLITS
from sharding.tars import shown

MOST_NAMES = 1_000_000
_RANGE = re.compile(r"\{(-?[0-9]+)\.\.(-?[0-9]+)((?:\.\.-?[0-9]+)?)\}")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_SPLIT = re.compile(rf",(?=(?:{'|'.join(SPLITS)})=)")


def split_patterns(argument: str) -> dict[str, str]:
    """SPLIT → pattern, from ``train=PATTERN,test=PATTERN`` or one pattern (train). Raises UserError for anything else."""
    named = _SPLIT.split(argument)
    if not any(one.startswith(f"{split}=") for one in named for split in SPLITS):
        return {"train": _local(argument)}
    patterns = {split: _local(pattern) for split, _, pattern in (one.partition("=") for one in named)}
    if "train" not in patterns or len(patterns) < len(named) or not all(patterns.values()):
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
        if "://" in part or (_SCHEME.match(part) and not any(map(_matches, islice(_names(part), 1000)))):
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
            paths += map(_file, found := [path for path in inside if path.suffix == ".tar" and not _by_macos(path)])
            if not found:
                raise UserError(f"{part} holds no .tar; give a directory of tars or a pattern")
            for path in {*inside} - {*found}:
                kind = HIDDEN if _by_macos(path) else f"{shown(path.suffix) or 'other'} files"
                left_out[f"{'directories' if path.is_dir() else kind} beside the tars"] += 1
            continue
        for name in _names(part):
            matches = _matches(name)
            if not matches and any(c in name for c in "*?["):
                raise UserError(f"{name} matches no file; check the pattern")
            paths += [_file(Path(match)) for match in matches or [name]]
    return [path.absolute() for path in paths]


def _by_macos(path: Path) -> bool:
    """Whether a file holds what macOS knows of another file: its name is that of the other behind ``._``."""
    return path.name.startswith("._")


def _file(path: Path) -> Path:
    if not path.is_file():
        what = "is a directory, a pipe or a device" if path.exists() else "does not exist"
        raise UserError(f"{path} {what}; check the pattern")
    return path


def _names(pattern: str) -> Iterator[str]:
    """The names, or patterns with asterisks, that a pattern with braces stands for; at most MOST_NAMES."""
    try:
        yield from islice(names := braceexpand(_RANGE.sub(_clipped, pattern)), MOST_NAMES)
    except ValueError as error:
        raise UserError(f"{pattern} is not a pattern ({error}); write it as shards-{{000..123}}.tar") from None
    if next(names, None) is not None:
        raise UserError(f"{pattern} names more than {MOST_NAMES:,} tars; give several patterns, as A::B")


def _clipped(found: re.Match[str]) -> str:
    """Shorten a range of numbers to one name too many: braceexpand holds all numbers of a range in memory."""
    first, last, step = int(found[1]), int(found[2]), found[3]
    if abs(last - first) <= (reach := MOST_NAMES * max(abs(int(step[2:] or 1)), 1)):
        return found[0]
    width = max(map(len, found.groups()[:2])) if re.search(r"(^|,)-?0[0-9]", f"{found[1]},{found[2]}") else 0
    ends = (str(number).zfill(width) for number in (first, first + reach if first < last else first - reach))
    return f"{{{'..'.join(ends)}{step}}}"


def _matches(name: str) -> list[str]:
    """The file of that name, or those that it matches."""
    return [name] if Path(name).exists() else sorted(glob(name, recursive=True))


def mixed(found: dict[str, list[Path]]) -> list[str]:
    """Return notes for the user on tars that are read as one split although their names tell several."""
    notes = []
    for split, paths in found.items():
        named: dict[str, list[Path]] = defaultdict(list)
        for path in paths:
            if told := split_in(path.stem) or split_in(path.parent.name):
                named[told].append(path)
        if len(named) > 1:
            patterns = {told: _pattern(named[told]) if "train" in named else "GLOB" for told in SPLITS if told in named}
            cure = ",".join(f"{told}={pattern}" for told, pattern in ({"train": "GLOB"} | patterns).items())
            examples = few(f"{path.parent.name}/{path.name}" for told in named.values() for path in told[:1])
            notes.append(f"{examples} are all read as {split}; {quote('webdataset:' + cure)} keeps the splits apart")
    return notes


def _pattern(paths: list[Path]) -> str:
    """Return a pattern that names just those tars, or ``GLOB`` if none with one asterisk does."""
    names = sorted(map(str, paths))
    head = os.path.commonprefix(names)
    tail = os.path.commonprefix([name[len(head) :][::-1] for name in names])[::-1]
    pattern = f"{head}*{tail}" if len(names) > 1 else names[0]
    plain = not set("*?[]{}\\") & set(head + tail) and "::" not in pattern
    return pattern if plain and _matches(pattern) == names else "GLOB"
