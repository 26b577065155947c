"""A copy of the tree that nobody installed, and an environment with few libraries: as on a machine that is lent. Holds no test."""

import os
import shutil
import subprocess
import sys
import venv
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
LIBRARIES = ("torch", "torchvision", "numpy", "safetensors", "tensorboard", "matplotlib", "pillow", "pyyaml", "tqdm")
"""With all that they need."""
WHEELS = ("simplejpeg", "jsonargparse", "braceexpand", "webdataset")
"""Put beside them, alone."""


def closure(names: tuple[str, ...]) -> set[str]:
    """These distributions and all that they need here."""
    found, left = set(), list(names)
    while left:
        name = left.pop().lower().replace("_", "-")
        if name not in found:
            found.add(name)
            for text in distribution(name).requires or ():
                need = Requirement(text)
                if need.marker is None or need.marker.evaluate({"extra": ""}):
                    left.append(need.name)
    return found


def environment(folder: Path) -> Path:
    """A Python that sees the standard library and these libraries, each as it is installed here, and nothing else."""
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for name in closure(LIBRARIES) | set(WHEELS):
        found = distribution(name)
        for top in {Path(file).parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(found.locate_file(top))).resolve())
    return folder / "bin" / "python"


def tree(folder: Path) -> Path:
    """The files of this checkout that git knows or would, without git."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout: its files are not known")
    for name in filter(None, os.fsdecode(listed.stdout).split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def clean() -> dict[str, str]:
    """The environment variables without those that point at this checkout or its libraries."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))} | {
        "PATH": f"/usr/bin:/bin:{Path(sys.executable).parent}"
    }
