"""Teachers that somebody else trained: a directory of safetensors files, each naming its architecture in its metadata.

``save_file(state_dict, "DIR/a.safetensors", metadata={"architecture": "torchvision:resnet18"})``. Architectures are our own
(`convnet`, `resnet18:32` …) or torchvision's (`torchvision:NAME`). ``mean`` and ``std`` in the metadata (JSON lists, of pixels in
[0, 1], one number a channel) say what the network expects; without them it gets the data set's.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from gdd_dist.models.classifiers import Classifier, build_classifier
from sharding.errors import UserError
from sharding.files import sha256_file
from sharding.manifest import Manifest

HOW = 'save it with metadata={"architecture": "torchvision:resnet18"} or the like'


@dataclass(frozen=True)
class Pretrained:
    """A file of a classifier. ``mean``, ``std``: of pixels in [0, 1], None for the data set's own."""

    path: Path
    architecture: str
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None


def files(directory: str) -> list[Pretrained]:
    """All classifiers of a directory, by name. Raises UserError where there is none, or one does not say what it is."""
    paths = sorted(Path(directory).glob("*.safetensors"))
    if not paths:
        raise UserError(f"--teachers.pretrained {directory} holds no .safetensors file; {HOW}")
    return [_described(p) for p in paths]


def _described(path: Path) -> Pretrained:
    try:
        with safe_open(path, framework="pt") as f:
            meta = f.metadata() or {}
    except (OSError, SafetensorError) as e:
        raise UserError(f"cannot read {path} ({e}); give whole safetensors files") from e
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
    """sha256 of each file, in the order of ``files``: what a pool of them is known by, wherever it lies."""
    return [_hash(f.path, f.path.stat().st_size, f.path.stat().st_mtime_ns) for f in files(directory)]


def load(file: Pretrained, manifest: Manifest) -> Classifier:
    """The network, with weights. Raises UserError where architecture, channels or class count do not fit."""
    mean, std = file.mean or manifest.mean, file.std or manifest.std
    try:
        net = build_classifier(
            file.architecture,
            channels=manifest.channels,
            size=manifest.height,
            classes=len(manifest.classes),
            mean=[2 * m - 1 for m in mean],
            std=[2 * s for s in std],
        )
    except UserError as e:
        raise UserError(f"{file.path}: {e}") from e
    expected, found = net.state_dict(), _named(load_file(file.path))
    found = {"mean": expected["mean"], "std": expected["std"], **found}
    for name, want in expected.items():
        if name not in found:
            raise UserError(f"{file.path} lacks {name}: it is no {file.architecture}; correct its metadata")
        if found[name].shape != want.shape:
            raise UserError(_mismatch(file, name, found[name], want, manifest))
    if extra := sorted(found.keys() - expected.keys()):
        raise UserError(f"{file.path} holds {extra[0]}, which {file.architecture} lacks; correct its metadata")
    net.load_state_dict(found)
    return net


def _named(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under our names: a plain network's are those of a classifier's body."""
    if any(name.startswith("body.") for name in state):
        return state
    return {f"body.{name}": value for name, value in state.items()}


def _mismatch(file: Pretrained, name: str, found: Tensor, want: Tensor, manifest: Manifest) -> str:
    classes = len(manifest.classes)
    if want.shape[:1] == (classes,) and found.shape[1:] == want.shape[1:]:
        return f"{file.path} knows {found.shape[0]} classes, {manifest.name} has {classes}; give classifiers of this data set"
    shapes = f"{tuple(found.shape)} instead of {tuple(want.shape)}"
    return f"{file.path}: {name} is {shapes}; give a {file.architecture} for {manifest.channels} × {manifest.height} × {manifest.width} images"
