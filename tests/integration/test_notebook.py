"""docs/quickstart.ipynb is a notebook without outputs, and its code runs on a finished run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import Finished

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"


def cells() -> list[dict[str, Any]]:
    book = json.loads(NOTEBOOK.read_text())
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5)
    assert book["metadata"]["kernelspec"]["name"] == "python3"
    found: list[dict[str, Any]] = book["cells"]
    return found


def test_it_is_a_small_notebook_without_outputs_or_paths_of_a_machine() -> None:
    assert NOTEBOOK.stat().st_size < 10_000
    ids = [cell["id"] for cell in cells()]
    assert len(set(ids)) == len(ids)
    for cell in cells():
        own = {"outputs": [], "execution_count": None} if cell["cell_type"] == "code" else {}
        assert {k: cell.get(k) for k in own} == own
        assert cell.keys() == {"cell_type", "id", "metadata", "source", *own}
        assert not re.search(r"[\"' ](/|~|[A-Z]:)\w", "".join(cell["source"]))


@pytest.mark.slow
def test_its_code_runs_from_the_folder_of_docs(reported: Finished, digits: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "digits"
    run.mkdir(parents=True)
    for part in reported.out.iterdir():
        (run / part.name).symlink_to(part)
    (run / "data").symlink_to(digits)
    (tmp_path / "docs").mkdir()
    code = "\n".join("".join(cell["source"]) for cell in cells() if cell["cell_type"] == "code")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path / "docs", env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "10 classes: 0, 1, 2" in done.stdout
    assert re.search(r"accuracy on 360 real test images: \d+\.\d %", done.stdout)
    results = json.loads((run / "report" / "latest" / "metrics.json").read_text())["results"]
    assert len(re.findall(r"labels, IPC .* %$", done.stdout, re.MULTILINE)) == len(results)
