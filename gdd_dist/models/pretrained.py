"""Pretrained teachers: a directory of safetensors files, each naming its architecture in its metadata.

``save_file(state_dict, "DIR/a.safetensors", metadata={"architecture": "torchvision:resnet18"})``. Architectures are our own
(`convnet`, `resnet18:32` …) or torchvision's (`torchvision:NAME`). ``mean`` and ``std`` in the metadata (JSON lists, of pixels in
[0, 1], one number per channel) give the normalization that the network expects; the default is that of the data set.
This module reads the files' metadata without torch; pretrained_networks.py builds the networks.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from sharding.errors import UserError
from sharding.files import sha256_file

HOW = 'save it with metadata={"architecture": "torchvision:resnet18"}, with its own architecture'


@dataclass(frozen=True)
class Pretrained:
    """A file of a classifier. ``mean``, ``std``: of pixels in [0, 1], None for those of the data set."""

    path: Path
    architecture: str
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None


def files(directory: str) -> list[Pretrained]:
    """Return all classifiers of a directory, by name. Raises UserError if there is none, or a file names no architecture."""
    paths = sorted(Path(directory).glob("*.safetensors"))
    if not paths:
        raise UserError(f"--teachers.pretrained {directory} holds no .safetensors file; {HOW}")
    return [_described(p) for p in paths]


def _described(path: Path) -> Pretrained:
    try:
        with safe_open(path, framework="numpy") as f:
            meta = f.metadata() or {}
    except (OSError, SafetensorError) as e:
        raise UserError(f"cannot read {path} ({e}); give complete safetensors files") from e
    values = {k: _value(meta[k]) for k in ("architecture", "mean", "std") if k in meta}
    if not isinstance(values.get("architecture"), str):
        raise UserError(f"{path} does not name its architecture; {HOW}")
    numbers = [None if values.get(k) is None else tuple(float(v) for v in values[k]) for k in ("mean", "std")]
    return Pretrained(path, values["architecture"], numbers[0], numbers[1])


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


@lru_cache(maxsize=256)
def _hash(path: Path, _size: int, _time: int) -> str:
    return sha256_file(path)


def hashes(directory: str) -> list[str]:
    """Return the sha256 of each file, in the order of ``files``; they identify the pool, independent of its path."""
    return [_hash(f.path, f.path.stat().st_size, f.path.stat().st_mtime_ns) for f in files(directory)]
