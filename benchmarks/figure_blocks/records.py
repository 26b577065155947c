"""The records in benchmarks/results, and tables in Markdown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def record(name: str) -> dict[str, Any]:
    """A record that is one JSON object."""
    found: dict[str, Any] = json.loads((RESULTS / name).read_text())
    return found


def lines(name: str, benchmark: str = "", **settings: Any) -> list[dict[str, Any]]:
    """The JSON lines of a record whose name begins with ``benchmark`` and whose settings are those given."""
    found = [json.loads(text) for text in (RESULTS / name).read_text().splitlines()]
    return [
        one for one in found if one["benchmark"].startswith(benchmark) and settings.items() <= one["settings"].items()
    ]


def only(name: str, benchmark: str, **settings: Any) -> dict[str, Any]:
    """The one line of a record that has exactly this name."""
    (found,) = (one for one in lines(name, benchmark, **settings) if one["benchmark"] == benchmark)
    return found


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])
