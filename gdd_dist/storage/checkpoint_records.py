"""How far checkpoints reach, by the names of their records: without torch, and none is opened."""

from __future__ import annotations

from pathlib import Path


def records(directory: Path) -> list[Path]:
    """The records of the checkpoints in one loop's directory, newest first; none is looked into."""
    return sorted(directory.glob("step-*.json"), key=step_of, reverse=True)


def newest_records(directory: Path) -> list[tuple[Path, int]]:
    """(record, step) of the newest checkpoint of each loop at or below ``directory``, unverified."""
    loops = sorted({record.parent for record in directory.rglob("step-*.json")})
    return [(newest, step_of(newest)) for newest in (records(loop)[0] for loop in loops)]


def step_of(path: Path) -> int:
    """The steps done as of a file step-NNN.json or step-NNN.pt."""
    return int(path.stem[5:])
