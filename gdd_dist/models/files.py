"""Networks on disk: safetensors files whose metadata describe the architecture, so that a file rebuilds its network."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from gdd_dist.storage.json_files import again, read_json
from sharding.errors import UserError
from sharding.files import write_atomic

if TYPE_CHECKING:  # not needed for drawing images
    from gdd_dist.models.classifiers import Classifier
    from gdd_dist.models.discriminator import Discriminator
    from gdd_dist.models.generator import ImageGenerator

TEACHERS = "teachers.json"
GENERATOR = "generator.safetensors"
DISCRIMINATOR = "discriminator.safetensors"


FAMILIES = {
    "r3gan": "generator.Generator",
    "gaussian": "gaussian.LinearGenerator",
    "residual": "residual_generator.ResidualGenerator",
}
"""Kinds of generator by the name in their files, and their class in `models`; a file without a name is of the first kind."""


def arguments(local: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a constructor that passes its ``locals()`` at its beginning; in a file they rebuild the network."""
    return {name: value for name, value in local.items() if name not in ("self", "__class__")}


def save_network(path: Path, net: nn.Module | dict[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write weights (of a network, or complete on the CPU) and metadata (JSON values) as safetensors, atomically."""
    weights = cpu_state(net) if isinstance(net, nn.Module) else net
    write_atomic(path, save(weights, metadata={k: json.dumps(v, sort_keys=True) for k, v in meta.items()}))


def read_network(path: Path, remedy: str | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return (weights on the CPU, metadata). Raises UserError naming a missing or invalid file; it ends with ``remedy``, default `again`."""
    try:
        with safe_open(path, framework="pt") as f:
            meta = {k: json.loads(v) for k, v in (f.metadata() or {}).items()}
        return load_file(path), meta
    except (OSError, SafetensorError, ValueError) as e:
        raise UserError(f"cannot read {path} as a network file of gdd_dist ({e}); {remedy or again(path)}") from e


def generator_meta(net: ImageGenerator) -> dict[str, Any]:
    """Return the entries about the network in the metadata of a generator's file."""
    family = next(name for name, place in FAMILIES.items() if place.endswith(f".{type(net).__name__}"))
    return {"format": "gdd-generator/1", "arch": net.arch, **({} if family == "r3gan" else {"family": family})}


def load_generator_network(path: Path, remedy: str | None = None) -> tuple[ImageGenerator, dict[str, Any]]:
    """Return the generator of a ``generator.safetensors`` and its metadata. ``remedy``: see `read_network`."""
    weights, meta = read_network(path, remedy)
    if meta.get("format") != "gdd-generator/1":
        raise UserError(f"{path} is not a generator of gdd_dist; give the generator.safetensors of gan or matching")
    family, fault = meta.get("family", "r3gan"), f"{path} does not hold the generator that it names"
    if not _well_formed(meta):
        raise UserError(f"{fault} (its metadata have another form); {remedy or again(path)}")
    if family not in FAMILIES:
        raise UserError(f"{path} holds a generator of kind {family}, which this version does not know; update gdd_dist")
    module, _, name = FAMILIES[family].partition(".")
    try:
        net: ImageGenerator = getattr(importlib.import_module(f"gdd_dist.models.{module}"), name)(**meta["arch"])
        net.load_state_dict(weights)
    except (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError) as e:
        raise UserError(f"{fault} ({type(e).__name__}: {e}); {remedy or again(path)}") from e
    return net, meta


def _well_formed(meta: Mapping[str, Any]) -> bool:
    """Whether the entries that programs read in a generator's metadata have the types that this package writes."""
    made = meta.get("provenance", {})
    parts = [made, *(made.get(name, {}) for name in ("fingerprints", "versions"))] if isinstance(made, dict) else [None]
    named = isinstance(meta.get("family", ""), str) and isinstance(meta.get("classes") or [], list)
    return named and all(isinstance(part, dict) for part in parts)


def load_discriminator_network(path: Path) -> Discriminator:
    """Return the discriminator of a ``discriminator.safetensors``."""
    from gdd_dist.models.discriminator import Discriminator

    weights, meta = read_network(path)
    net = Discriminator(**meta["arch"])
    net.load_state_dict(weights)
    return net


@dataclass(frozen=True)
class Teacher:
    """A trained teacher: index in the pool, file, architecture, whether it is the last snapshot of its training, val accuracy in percent."""

    index: int
    path: Path
    architecture: str
    last: bool
    val_accuracy: float

    def weights(self) -> dict[str, Tensor]:
        """Return the weights on the CPU."""
        return read_network(self.path)[0]

    def load(self, channels: int, size: int, classes: int) -> Classifier:
        """Return the network on the CPU, frozen, in evaluation mode; mean and std are among the weights."""
        from gdd_dist.models.classifiers import build_classifier

        shape = {"channels": channels, "size": size, "classes": classes}
        with torch.device("meta"):  # the initial weights are replaced, so they need no memory and no random numbers
            net = build_classifier(self.architecture, **shape, mean=[0.0] * channels, std=[1.0] * channels)
        net.load_state_dict(self.weights(), assign=True)
        return net.eval().requires_grad_(False)


def read_teachers(directory: Path) -> list[Teacher]:
    """Return the pool of a finished teachers step, in file order."""

    def take(document: Any) -> list[Teacher]:
        return [
            Teacher(i, directory / r["file"], r["architecture"], r["last"], r["val_accuracy"])
            for i, r in enumerate(document["teachers"])
        ]

    return read_json(directory / TEACHERS, take)


def cpu_state(net: nn.Module) -> dict[str, Tensor]:
    """Return weights and buffers as contiguous copies on the CPU."""
    return {k: v.detach().cpu().contiguous().clone() for k, v in net.state_dict().items()}
