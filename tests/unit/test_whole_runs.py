"""benchmarks/whole_runs.py: differences are paired by student, their error is over runs."""

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import whole_runs


def row(train_on: str, *accuracies: float, **more: Any) -> dict[str, Any]:
    same = {"student": "convnet", "protocol": "regenerate", "labels": "hard", "ipc": 10, "bytes": 1000}
    budget = {"optimizer_steps": 300, "batch": 20, "images_seen": 6000}
    return {"train_on": train_on, "accuracies": list(accuracies), **same, **budget, **more}


def test_rows_and_differences_of_two_runs() -> None:
    full = row("full", 60.0, 60.0, ipc=None, protocol=None)
    runs = [
        {"results": [full, row("gaussian", 30.0, 32.0), row("matched", 33.0, 33.0), row("matched", 36.0, 37.0, select=3)]},
        {"results": [full, row("gaussian", 31.0, 31.0), row("matched", 31.0, 32.0), row("matched", 34.0, 36.0, select=3)]},
    ]  # fmt: skip
    found = whole_runs.summary(runs)
    assert [(r["train_on"], r["of_runs"], r["students"]) for r in found["rows"]] == [
        ("gaussian", [31.0, 31.0], 4),
        ("matched", [33.0, 31.5], 4),
        ("matched, best of 3", [36.5, 35.0], 4),
    ]
    by = {(d["row"], d["minus"]): d for d in found["differences"]}
    assert by.keys() == {("matched", "gaussian"), ("matched, best of 3", "matched")}
    assert by["matched", "gaussian"]["of_runs"] == [2.0, 0.5]
    moved = row("matched", 40.0, 40.0, protocol="fixed", condense=9)
    beside = [row("real", 30.0, 31.0, protocol="fixed", **more) for more in ({}, {"select": 30})]
    differences = whole_runs.summary([{"results": [*beside, moved]}])["differences"]
    assert {(d["row"], d["minus"]) for d in differences} == {
        ("real, best of 30", "real"),
        ("matched, condensed", "real"),
        ("matched, condensed", "real, best of 30"),
    }
    assert (by["matched", "gaussian"]["mean"], by["matched", "gaussian"]["stderr"]) == (1.25, pytest.approx(0.75))
