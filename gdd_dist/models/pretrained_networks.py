"""Builds the networks of pretrained teachers."""

from __future__ import annotations

from safetensors.torch import load_file
from torch import Tensor

from gdd_dist.models.classifiers import Classifier, build_classifier
from gdd_dist.models.pretrained import Pretrained
from sharding.errors import UserError
from sharding.manifest import Manifest


def load(file: Pretrained, manifest: Manifest) -> Classifier:
    """Return the network with its weights. Raises UserError if architecture, channels or class count do not fit."""
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
            raise UserError(f"{file.path} lacks {name}, so it is not a {file.architecture}; correct its metadata")
        if found[name].shape != want.shape:
            raise UserError(_mismatch(file, name, found[name], want, manifest))
    if extra := sorted(found.keys() - expected.keys()):
        raise UserError(f"{file.path} holds {extra[0]}, which {file.architecture} lacks; correct its metadata")
    net.load_state_dict(found)
    return net


def _named(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return weights under our names: those of a plain network become those of a classifier's body."""
    if any(name.startswith("body.") for name in state):
        return state
    return {f"body.{name}": value for name, value in state.items()}


def _mismatch(file: Pretrained, name: str, found: Tensor, want: Tensor, manifest: Manifest) -> str:
    classes = len(manifest.classes)
    if want.shape[:1] == (classes,) and found.shape[1:] == want.shape[1:]:
        return f"{file.path} has {found.shape[0]} classes, but {manifest.name} has {classes}; give classifiers trained on this data set"
    shapes = f"{tuple(found.shape)} instead of {tuple(want.shape)}"
    return f"{file.path}: {name} is {shapes}; give a {file.architecture} for {manifest.channels} × {manifest.height} × {manifest.width} images"
