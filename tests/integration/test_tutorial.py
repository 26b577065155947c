"""Every command of docs/tutorial.md is executed, in its order, on a folder of small made-up photographs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(sh|python|text)\n(.*?)^```", re.MULTILINE | re.DOTALL)
CLASSES = ("airplane", "automobile", "horse", "ship")


def photographs(folder: Path, each: int = 120) -> None:
    """JPEGs [32, 40, 3]: a spot in the class's place and colour, on noise."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:32, :40]
    for c, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for i in range(each):
            spot = np.hypot(y - 8 - 16 * (c // 2) - rng.normal(), x - 10 - 20 * (c % 2) - rng.normal()) < 9
            pixels = rng.integers(60, 140, (32, 40, 3)) + 90 * spot[..., None] * np.eye(3, dtype=int)[c % 3]
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i:04d}.jpg")


def masked(text: str) -> list[str]:
    """Its lines, figures and the widths of columns aside."""
    return [" ".join(re.sub(r"[\d.,]+", "N", line).replace("-", "").split()) for line in text.splitlines()]


@pytest.mark.slow
def test_the_tutorial_does_what_it_says(tmp_path: Path) -> None:
    photographs(tmp_path / "photos")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    said: list[str] = []
    for kind, text in BLOCK.findall((ROOT / "docs" / "tutorial.md").read_text()):
        if kind == "sh":
            command = ["bash", "-ec", text]
            done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
            said.append(done.stdout)
        elif kind == "python":
            name = re.match(r"# ([\w.]+)\n", text)
            assert name, "the block does not say which file it is"
            (tmp_path / name[1]).write_text(text)
        else:
            missing = [line for line in masked(text) if line not in masked(said[-1])]
            assert not missing, f"{missing} is not in\n{said[-1]}"
    accuracy = re.search(r"real photographs: ([\d.]+) %", "".join(said))
    assert accuracy
    assert float(accuracy[1]) > 200 / len(CLASSES), "hardly better than chance, on images that are easy to tell apart"
