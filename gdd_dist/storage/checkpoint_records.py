"""Reads the progress of a loop from the names of its checkpoints' records, without torch and without opening a file."""

from __future__ import annotations

from pathlib import Path


def records(directory: Path) -> list[Path]:
    """Return the records of the checkpoints in one loop's directory, newest first; none is opened."""
    return sorted(directory.glob("step-*.json"), key=step_of, reverse=True)


def newest_records(directory: Path) -> list[tuple[Path, int]]:
    """Return (record, step) of the newest checkpoint of each loop at or below ``directory``, unverified."""
    loops = sorted({record.parent for record in directory.rglob("step-*.json")})
    return [(newest, step_of(newest)) for newest in (records(loop)[0] for loop in loops)]


def step_of(path: Path) -> int:
    """Return the number of steps in the name step-NNN.json or step-NNN.pt."""
    return int(path.stem[5:])
