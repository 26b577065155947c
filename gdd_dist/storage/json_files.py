"""JSON files: written atomically, read with a clear error when damaged; and fingerprints of JSON."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, overload

from sharding.errors import UserError
from sharding.files import write_atomic

Taken = TypeVar("Taken")


def fingerprint(parts: Mapping[str, Any]) -> str:
    """Return 16 hex digits of the SHA-256 of ``parts`` as canonical JSON. Raises TypeError for values JSON cannot hold."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def json_bytes(value: Any) -> bytes:
    """Return a value as JSON, formatted as in all files of this package."""
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    write_atomic(path, json_bytes(value))


ALONE = "remove this file and run the same command again; it is written anew"
"""What to do about a damaged file that lies beside others that are needed."""


def again(path: Path) -> str:
    """Return what to do about a damaged file of a step. The step's directory is named without links, since removing a link helps nobody."""
    return f"remove {path.parent.resolve()} and run gdd_dist.train again to compute it"


@overload
def read_json(path: Path) -> Any: ...
@overload
def read_json(path: Path, take: Callable[[Any], Taken], remedy: str | None = None) -> Taken: ...
def read_json(path: Path, take: Callable[[Any], Any] = lambda value: value, remedy: str | None = None) -> Any:
    """Return ``take`` of the value in a JSON file. Raises UserError naming a missing or damaged file, and what to do.

    A file in which ``take`` does not find what it looks for is damaged too. ``remedy``: what to do; default: `again`, which is
    right only for a file that lies directly in a step's directory.
    """
    remedy = remedy or again(path)
    try:
        value = json.loads(path.read_bytes())
    except OSError as e:
        raise UserError(f"cannot read {path} ({e.strerror}); {remedy}") from e
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is damaged (not JSON); {remedy}") from e
    try:
        return take(value)
    except (AttributeError, LookupError, TypeError, ValueError) as e:
        raise UserError(f"{path} is damaged (not as it was written); {remedy}") from e


def append_json(path: Path, value: Any) -> None:
    """Append a line of JSON, durable when this returns; a line truncated by a crash does not damage the next one."""
    text = json.dumps(value, allow_nan=False) + "\n"
    with path.open("ab+") as stream:
        if stream.tell():
            stream.seek(-1, os.SEEK_END)
            text = text if stream.read(1) == b"\n" else "\n" + text
        stream.write(text.encode())
        stream.flush()
        os.fsync(stream.fileno())


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (number, value) for each line of a file written by ``append_json``; value None for a damaged line. No file: nothing."""
    content = path.read_bytes() if path.exists() else b""
    for number, text in enumerate(content.split(b"\n"), 1):
        if text.strip():
            try:
                value = json.loads(text)
            except ValueError:
                value = None
            yield number, value
