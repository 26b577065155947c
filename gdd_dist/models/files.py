"""Networks on disk: safetensors files whose metadata says what they are, so that a file rebuilds its network."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from gdd_dist.models.generator import Generator
from gdd_dist.storage.json_files import read_json
from sharding.errors import UserError
from sharding.files import write_atomic

if TYPE_CHECKING:  # who only draws needs neither
    from gdd_dist.models.classifiers import Classifier
    from gdd_dist.models.discriminator import Discriminator

TEACHERS = "teachers.json"
GENERATOR = "generator.safetensors"
DISCRIMINATOR = "discriminator.safetensors"


def save_network(path: Path, net: nn.Module | dict[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write weights (a network's, or whole ones on the CPU) and metadata (JSON values) as safetensors, whole or not at all."""
    weights = cpu_state(net) if isinstance(net, nn.Module) else net
    write_atomic(path, save(weights, metadata={k: json.dumps(v, sort_keys=True) for k, v in meta.items()}))


AGAIN = "remove its directory to compute it again"


def read_network(path: Path, remedy: str = AGAIN) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(weights on the CPU, metadata). Raises UserError, which ends with ``remedy``, naming a file that is missing or none of ours."""
    try:
        with safe_open(path, framework="pt") as f:
            meta = {k: json.loads(v) for k, v in (f.metadata() or {}).items()}
        return load_file(path), meta
    except (OSError, SafetensorError, ValueError) as e:
        raise UserError(f"cannot read {path} as a network of ours ({e}); {remedy}") from e


def load_generator_network(path: Path, remedy: str = AGAIN) -> tuple[Generator, dict[str, Any]]:
    """The generator of a ``generator.safetensors`` and its metadata. ``remedy``: as of `read_network`."""
    weights, meta = read_network(path, remedy)
    if meta.get("format") != "gdd-generator/1":
        raise UserError(f"{path} is no generator of ours; give the generator.safetensors of a gan or matching step")
    try:
        net = Generator(**meta["arch"])
        net.load_state_dict(weights)
    except (KeyError, TypeError, RuntimeError) as e:
        raise UserError(f"{path} does not hold the generator that it names ({type(e).__name__}: {e}); {remedy}") from e
    return net, meta


def load_discriminator_network(path: Path) -> Discriminator:
    """The discriminator of a ``discriminator.safetensors``."""
    from gdd_dist.models.discriminator import Discriminator

    weights, meta = read_network(path)
    net = Discriminator(**meta["arch"])
    net.load_state_dict(weights)
    return net


@dataclass(frozen=True)
class Teacher:
    """A trained teacher: its place in the pool, file, architecture, whether it is its training's last snapshot, val accuracy in percent."""

    index: int
    path: Path
    architecture: str
    last: bool
    val_accuracy: float

    def weights(self) -> dict[str, Tensor]:
        """Weights on the CPU."""
        return read_network(self.path)[0]

    def load(self, channels: int, size: int, classes: int) -> Classifier:
        """The network on the CPU, frozen, in evaluation mode; mean and std come with the weights."""
        from gdd_dist.models.classifiers import build_classifier

        shape = {"channels": channels, "size": size, "classes": classes}
        with torch.device("meta"):  # no time, and no random numbers, for weights that are replaced at once
            net = build_classifier(self.architecture, **shape, mean=[0.0] * channels, std=[1.0] * channels)
        net.load_state_dict(self.weights(), assign=True)
        return net.eval().requires_grad_(False)


def read_teachers(directory: Path) -> list[Teacher]:
    """The pool of a finished teachers step, in file order."""
    records = read_json(directory / TEACHERS)["teachers"]
    return [
        Teacher(i, directory / r["file"], r["architecture"], r["last"], r["val_accuracy"])
        for i, r in enumerate(records)
    ]


def cpu_state(net: nn.Module) -> dict[str, Tensor]:
    """Weights and buffers, contiguous copies on the CPU."""
    return {k: v.detach().cpu().contiguous().clone() for k, v in net.state_dict().items()}
