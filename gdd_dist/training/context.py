"""What every step is handed: settings, ranks, data, where to write, and the count of forwarded images."""

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
"""Directory in STORE of what is kept only to be faster."""
Network = TypeVar("Network", bound=nn.Module)
OnInterval = Callable[[int, nn.Module, Any], None]
"""(step, generator, its measurement), called on rank 0 at each of matching's intervals. It may raise."""


@dataclass
class Context:
    """A run as its steps see it. ``forwards``: images that went through a network on this rank, in this invocation.

    ``on_interval``: what a search is told by matching.
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
    outlook: object = ""
    """Says as text how long the whole run still takes, or nothing."""
    _images: dict[str, Images] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return self.world.device

    @cached_property
    def team(self) -> Team:
        """The ranks that train this rank's teachers with it. All ranks ask for it first at the same place."""
        return Team(self.world, self.config.teachers.ranks_per_teacher)

    @property
    def classes(self) -> int:
        """C."""
        return len(self.manifest.classes)

    @property
    def mean(self) -> list[float]:
        """Channel means of train, of pixels in [-1, 1]."""
        return [2 * m - 1 for m in self.manifest.mean]

    @property
    def std(self) -> list[float]:
        """Channel standard deviations of train, of pixels in [-1, 1]; 1 for a channel that is the same everywhere."""
        return divisors([2 * s for s in self.manifest.std])

    @property
    def class_names(self) -> list[str]:
        """As they can be printed and drawn."""
        return [printable(name) for name in self.manifest.classes]

    @cached_property
    def fill(self) -> torch.Tensor:
        """``mean`` on the device, float32 [channels]: what augmentation puts where an image does not reach."""
        return torch.tensor(self.mean, device=self.device)

    @cached_property
    def sent(self) -> Sender:
        """Called with a batch, gives it on the device; in the thread that reads ahead."""
        return Sender(self.device)

    def generator_meta(self, net: ImageGenerator, provenance: Mapping[str, Any]) -> dict[str, Any]:
        """The metadata of a generator's file. ``normalization`` is of train's pixels in [-1, 1]."""
        normalization = {"range": [-1, 1], "mean": self.mean, "std": self.std}
        about = {"classes": list(self.manifest.classes), "normalization": normalization, "provenance": provenance}
        return {**generator_meta(net), **about}

    @contextmanager
    def among(self, ranks: int) -> Iterator[bool]:
        """Inside, the world is its first ``ranks`` ranks, for what they alone do; whether this rank is one. All ranks enter it."""
        world, disks = self.world, self.disks
        if ranks < world.size:
            self.world = world.part(range(ranks))
            self.disks = disks.among(self.world)
        try:
            yield self.world.rank >= 0
        finally:
            self.world, self.disks = world, disks

    def images(self, split: str) -> Images:
        """The split's images, opened once."""
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
        """Put a network on the device and count the images it forwards."""

        def count(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            self.forwards += len(inputs[0])

        network.register_forward_pre_hook(count)
        return network.to(self.device)

    def classifier(self, name: str, seed: int, purpose: str) -> Classifier:
        """A fresh classifier for this data set; its weights are a function of (seed, purpose)."""
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
        """A trained teacher, frozen, in evaluation mode, to be asked under autocast of the run's precision."""
        net = teacher.load(self.manifest.channels, self.manifest.height, self.classes)
        return self.watch(self.compiled(cast_once(net, self.precision)))

    def compiled(self, net: Network) -> Network:
        """``net``, its forward compiled where the run compiles."""
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
        """This run's augmentation of float images [B, C, H, W], replayed by ``draws`` [B, AUGMENT_DRAWS]."""
        loader = self.config.loader
        return augment(images, draws.to(images.device), flip=loader.flip, ops=loader.augment, fill=self.fill)

    def checkpoints(self, directory: Path) -> Checkpoints:
        """Checkpoints of a loop that this rank runs for itself."""
        return Checkpoints(directory, self.config.checkpoint_seconds, say, self.config.checkpoints_kept)

    def shared_checkpoints(self, work: Path) -> Checkpoints:
        """Checkpoints of the loop that all ranks run together in the step's directory ``work``; rank 0 writes them."""
        directory, seconds, keep = work / CHECKPOINTS, self.config.checkpoint_seconds, self.config.checkpoints_kept
        bring = partial(self.disks.mirror, directory, ["*"])
        return Checkpoints(directory, seconds, self.world.say, keep, self.world.gather, bring)

    def monitor(self, step: str, work: Path, total: int, *, start: int = 0, unit: str = "step") -> Monitor:
        """The monitor of a step that works in ``work``."""
        directory = self.out / "tensorboard" / step / work.name[:8]
        return Monitor(directory, step, total, start=start, unit=unit, active=self.world.is_main, whole=self.outlook)

    def passing(self, what: str, total: int, unit: str = "step") -> Monitor:
        """Progress of a part of a step: on rank 0, of its own share."""
        return Monitor(None, what, total, unit=unit, active=self.world.is_main, passing=True, whole=self.outlook)


def agreed_precision(config: Config, world: World) -> str:
    """The run's precision: ``auto`` as rank 0 resolves it, so that hosts of different hardware compute alike. All ranks call it.

    From now on this process computes in it.
    """
    precision = str(world.broadcast(resolve_precision(config.precision, world.device)))
    allow_tf32(precision == "tf32")
    return precision


def train_order(config: Config, step: str, shard_samples: Sequence[int], purpose: str) -> Order:
    """The order in which ``step`` sees train, in batches of its ``batch``. Raises UserError when that does not fit."""
    batch, streams, window = getattr(config, step).batch, config.streams(step), config.loader.window
    try:
        return Order(tuple(shard_samples), batch, streams, config.step_seed(step), purpose, window)
    except ValueError as e:
        raise UserError(f"--{step}.batch: {e}; make it smaller") from e


class seeded:
    """Inside, torch's global generator is a function of (seed, purpose); outside it is as before."""

    def __init__(self, seed: int, purpose: str) -> None:
        self._seed = int(permutation(seed, f"init/{purpose}", 0, 2**20)[0])
        self._fork = torch.random.fork_rng(devices=[])

    def __enter__(self) -> None:
        self._fork.__enter__()
        torch.manual_seed(self._seed)

    def __exit__(self, *args: Any) -> None:
        self._fork.__exit__(*args)
