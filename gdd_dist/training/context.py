"""The context that every step gets: settings, ranks, data, output paths, and the count of forwarded images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from gdd_dist.config.settings import Config
from gdd_dist.data.augment import augment
from gdd_dist.data.images import Images
from gdd_dist.data.noise import permutation
from gdd_dist.data.order import Order
from gdd_dist.data.transfer import Sender
from gdd_dist.engines.captured import Captured, Step
from gdd_dist.engines.compiled import compiled
from gdd_dist.engines.precision import cast_once, resolve_precision
from gdd_dist.models.classifiers import Classifier, build_classifier, divisors
from gdd_dist.models.files import Teacher, generator_meta
from gdd_dist.models.generator import ImageGenerator
from gdd_dist.runtime.devices import allow_tf32
from gdd_dist.runtime.file_exchange import Disks
from gdd_dist.runtime.monitor import Monitor, say
from gdd_dist.runtime.teams import Team
from gdd_dist.runtime.world import World
from gdd_dist.storage.checkpoints import Checkpoints
from gdd_dist.storage.printable import printable
from gdd_dist.storage.store import CHECKPOINTS, Store
from sharding.errors import UserError
from sharding.manifest import Manifest

CACHE = "cache"
"""Directory in STORE for files that only save time."""
Network = TypeVar("Network", bound=nn.Module)
OnInterval = Callable[[int, nn.Module, Any], None]
"""Called on rank 0 at each interval of matching with (step, generator, its measurement). It may raise."""


@dataclass
class Context:
    """A run, as seen by its steps. ``forwards``: number of images that a network forwarded on this rank in this process.

    ``on_interval``: called by matching, so that a search gets its measurements.
    """

    config: Config
    world: World
    data: Path
    manifest: Manifest
    store: Store
    out: Path
    precision: str
    forwards: int = 0
    resumed: bool = False
    disks: Disks = field(default_factory=Disks)
    keeps: bool = True
    """Whether decoded images may be kept in STORE/cache."""
    on_interval: OnInterval | None = None
    outlook: Callable[[float], str] = lambda loop: ""
    """Returns as text how long the whole run still takes, for the seconds left of the loop at work; empty: unknown."""
    _images: dict[str, Images] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """The device of this rank."""
        return self.world.device

    @cached_property
    def team(self) -> Team:
        """The ranks that train a teacher together with this rank. The first access must happen on all ranks together."""
        return Team(self.world, self.config.teachers.ranks_per_teacher)

    @property
    def classes(self) -> int:
        """The number of classes C."""
        return len(self.manifest.classes)

    @property
    def mean(self) -> list[float]:
        """Channel means of train, of pixels in [-1, 1]."""
        return [2 * m - 1 for m in self.manifest.mean]

    @property
    def std(self) -> list[float]:
        """Channel standard deviations of train, of pixels in [-1, 1]; 1 for a constant channel."""
        return divisors([2 * s for s in self.manifest.std])

    @property
    def class_names(self) -> list[str]:
        """Class names that can be printed and drawn."""
        return [printable(name) for name in self.manifest.classes]

    @cached_property
    def fill(self) -> torch.Tensor:
        """``mean`` on the device, float32 [channels]: augmentation fills pixels outside of an image with it."""
        return torch.tensor(self.mean, device=self.device)

    @cached_property
    def sent(self) -> Sender:
        """A function that copies a batch to the device; called in the thread that reads ahead."""
        return Sender(self.device)

    def generator_meta(self, net: ImageGenerator, provenance: Mapping[str, Any]) -> dict[str, Any]:
        """Return the metadata of a generator's file. ``normalization`` is that of train's pixels in [-1, 1]."""
        normalization = {"range": [-1, 1], "mean": self.mean, "std": self.std}
        about = {"classes": list(self.manifest.classes), "normalization": normalization, "provenance": provenance}
        return {**generator_meta(net), **about}

    @contextmanager
    def among(self, ranks: int) -> Iterator[bool]:
        """Reduce the world to its first ``ranks`` ranks inside the context; yields whether this rank is one. All ranks enter it."""
        world, disks = self.world, self.disks
        if ranks < world.size:
            self.world = world.part(range(ranks))
            self.disks = disks.among(self.world)
        try:
            yield self.world.rank >= 0
        finally:
            self.world, self.disks = world, disks

    def images(self, split: str) -> Images:
        """Return the split's images, opened once."""
        if split not in self._images:
            loader = self.config.loader
            self._images[split] = Images(
                self.data,
                self.manifest,
                split,
                threads=loader.threads or self.world.threads,
                resident=loader.resident,
                cache=self.store.root / CACHE if self.keeps else None,
                device=self.device,
            )
        return self._images[split]

    def watch(self, network: Network) -> Network:
        """Move a network to the device and count the images that it forwards."""

        def count(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            self.forwards += len(inputs[0])

        network.register_forward_pre_hook(count)
        return network.to(self.device)

    def classifier(self, name: str, seed: int, purpose: str) -> Classifier:
        """Return a new classifier for this data set; its weights are a function of (seed, purpose)."""
        with seeded(seed, purpose):
            net = build_classifier(
                name,
                channels=self.manifest.channels,
                size=self.manifest.height,
                classes=self.classes,
                mean=self.mean,
                std=self.std,
            )
        return self.watch(self.compiled(net))

    def teacher(self, teacher: Teacher) -> Classifier:
        """Return a trained teacher, frozen, in evaluation mode; call it under autocast to the run's precision."""
        net = teacher.load(self.manifest.channels, self.manifest.height, self.classes)
        return self.watch(self.compiled(cast_once(net, self.precision)))

    def compiled(self, net: Network) -> Network:
        """Return ``net``, with its forward compiled if --compile is set."""
        return compiled(net) if self.config.compile else net

    def captured(self, step: Step) -> Step:
        """``step`` of a network's images and targets, each time alike; on a GPU a CUDA graph where the run compiles."""
        if not self.config.compile or self.device.type != "cuda":
            return step
        graph = Captured(step)

        def counted(images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            before = self.forwards
            moved = graph(images, targets)
            self.forwards = before + len(images)  # a replay calls no hook, and a recording forwards nothing
            return moved

        return counted

    def augment(self, images: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        """Apply this run's augmentation to float images [B, C, H, W], determined by ``draws`` [B, AUGMENT_DRAWS]."""
        loader = self.config.loader
        return augment(images, draws.to(images.device), flip=loader.flip, ops=loader.augment, fill=self.fill)

    def checkpoints(self, directory: Path) -> Checkpoints:
        """Return the checkpoints of a loop that this rank runs alone."""
        return Checkpoints(directory, self.config.checkpoint_seconds, say, self.config.checkpoints_kept)

    def shared_checkpoints(self, work: Path) -> Checkpoints:
        """Return the checkpoints of a loop of all ranks in the step's directory ``work``; rank 0 writes them."""
        directory, seconds, keep = work / CHECKPOINTS, self.config.checkpoint_seconds, self.config.checkpoints_kept
        bring = partial(self.disks.mirror, directory, ["*"])
        return Checkpoints(directory, seconds, self.world.say, keep, self.world.gather, bring)

    def monitor(self, step: str, work: Path, total: int, *, start: int = 0, unit: str = "step") -> Monitor:
        """Return the monitor of a step that works in ``work``."""
        directory = self.out / "tensorboard" / step / work.name[:8]
        return Monitor(directory, step, total, start=start, unit=unit, active=self.world.is_main, whole=self.outlook)

    def passing(self, what: str, total: int, unit: str = "step") -> Monitor:
        """Return a monitor for a part of a step: rank 0 shows the progress of its own share."""
        return Monitor(None, what, total, unit=unit, active=self.world.is_main, passing=True, whole=self.outlook)


def agreed_precision(config: Config, world: World) -> str:
    """Return the run's precision; rank 0 resolves ``auto``, so that hosts of different hardware agree. All ranks call it.

    It also sets TF32 in this process.
    """
    precision = str(world.broadcast(resolve_precision(config.precision, world.device)))
    allow_tf32(precision == "tf32")
    return precision


def train_order(config: Config, step: str, shard_samples: Sequence[int], purpose: str) -> Order:
    """Return the order in which ``step`` sees train, in batches of its ``batch``. Raises UserError if that is too large."""
    batch, streams, window = getattr(config, step).batch, config.streams(step), config.loader.window
    try:
        return Order(tuple(shard_samples), batch, streams, config.step_seed(step), purpose, window)
    except ValueError as e:
        raise UserError(f"--{step}.batch: {e}; lower it") from e


class seeded:
    """Seed torch's global generator with (seed, purpose) inside the context, and restore it afterwards."""

    def __init__(self, seed: int, purpose: str) -> None:
        self._seed = int(permutation(seed, f"init/{purpose}", 0, 2**20)[0])
        self._fork = torch.random.fork_rng(devices=[])

    def __enter__(self) -> None:
        self._fork.__enter__()
        torch.manual_seed(self._seed)

    def __exit__(self, *args: Any) -> None:
        self._fork.__exit__(*args)
