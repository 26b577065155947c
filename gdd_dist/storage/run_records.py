"""OUT/steps.json: what the last command on a run did in each step that it reached."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gdd_dist.storage.json_files import ALONE, read_json, write_json

FILE = "steps.json"


def write_records(out: Path, records: Mapping[str, Mapping[str, Any]]) -> None:
    """Write STEP → {status, fingerprint, seconds, …}."""
    write_json(out / FILE, {"format": "gdd-steps/1", "steps": records})


def read_records(out: Path) -> dict[str, dict[str, Any]]:
    """Return STEP → {status, fingerprint, seconds, …}; {} if no command has run. Raises UserError naming a damaged file."""
    if not (out / FILE).exists():
        return {}
    found: dict[str, dict[str, Any]] = read_json(out / FILE, _records, ALONE)
    return found


def _records(document: Any) -> dict[str, dict[str, Any]]:
    return {
        step: {**r, "status": str(r["status"]), "fingerprint": str(r["fingerprint"]), "seconds": float(r["seconds"])}
        for step, r in document["steps"].items()
    }
