"""The four training steps as a run does them, on real shards and made-up earlier steps: what the phases share."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from gdd_dist.config import command_line
from gdd_dist.config.settings import Config
from gdd_dist.config.steps import fingerprints
from gdd_dist.data.augment import AUGMENT_DRAWS
from gdd_dist.data.images import to_float
from gdd_dist.data.logit_cache import MEANS
from gdd_dist.data.noise import normal, uniform
from gdd_dist.dry_run.estimates import ESTIMATES
from gdd_dist.dry_run.trial import SILENT, Trial
from gdd_dist.runtime.meter import Meter
from gdd_dist.runtime.world import World
from gdd_dist.steps import gan, matching, teachers
from gdd_dist.steps.teacher_pool import Training
from gdd_dist.storage.store import Store
from gdd_dist.training.classifier_fit import sgd, train_step
from gdd_dist.training.context import Context, agreed_precision
from gdd_dist.training.skipped_steps import Skips
from sharding.manifest import Manifest

STEPS = ("teachers", "gan", "matching", "student")
LOSSES = {"teachers": ("loss",), "gan": ("loss_g", "loss_d"), "matching": ("loss", "loss_d"), "student": ("loss",)}
_SMALL = (
    "--teachers.architectures convnet:16 resnet10:16 --teachers.seeds 1 --teachers.snapshots 1 --teachers.epochs 1 --teachers.batch 16 "
    "--logits.views 2 --gan.steps 12 --gan.batch 16 --gan.width 32 --gan.d_width 32 --gan.blocks 1 --gan.d_blocks 1 --gan.patch 2 "
    "--matching.steps 12 --matching.batch 16 --matching.group 4 --matching.interval 6 --matching.quick_students 2 --matching.quick_steps 5 "
    "--matching.quick_student convnet:8 --matching.quick_batch 10 --gaussian.components 8 --report.ipc 2 --report.epochs 4 "
    "--report.students convnet:8 --report.full_epochs 1 --report.seeds 2 --report.batch 16 --channels_last true"
)
SMALL = _SMALL.split()
"""Settings of a rehearsal, and of whatever the CPU of a GPU's host must do too."""
FIRST_WARM = 3
"""Steps before anything is measured: they pay for first calls, and are the ones that are logged most."""


def exists(setting: str, choice: str | None = None) -> bool:
    """Whether this checkout's trainer has the setting, and the choice of it."""
    fields = {f.name: f for f in dataclasses.fields(Config)}
    return setting in fields and (choice is None or choice in (fields[setting].metadata.get("choices") or ()))


def switch(variant: str) -> list[str] | None:
    """The settings of a variant of the speed phase; None where this checkout has no such switch."""
    if variant in ("bf16", "float32", "fp16", "tf32"):
        return ["--precision", variant] if exists("precision", variant) else None
    if variant == "streamed":
        return ["--precision", "bf16", "--loader.resident", "none"]
    if variant == "channels_first":
        return ["--precision", "bf16", "--channels_last", "false"] if exists("channels_last") else None
    return ["--precision", "bf16", f"--{variant}", "true"] if exists(variant) else None


class Student:
    """A student of the report on real images, as a trainee."""

    name = "student"

    def __init__(self, ctx: Context) -> None:
        r = ctx.config.report
        self._ctx, self.batch = ctx, min(r.batch, max(r.ipc) * ctx.classes)
        self._net, self.skips = ctx.classifier(r.students[0], 0, "bench"), Skips()
        optimizer = sgd(self._net, r.lr, r.momentum, r.weight_decay)
        self.step = ctx.captured(partial(train_step, self._net, optimizer, lr=r.lr, precision=ctx.precision))
        self._images = ctx.images("train")

    def read(self, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Images uint8 [b, C, H, W], labels int64 [b], augmentation draws; on the device."""
        rows = (np.arange(self.batch) + step * self.batch) % len(self._images)
        draws = uniform(0, "bench/augment", step, np.arange(self.batch), AUGMENT_DRAWS)
        labels = torch.from_numpy(self._images.labels[rows])
        return self._ctx.sent((self._images.read(rows), labels, torch.from_numpy(draws)))

    def train(self, step: int, batch: Any) -> dict[str, torch.Tensor]:
        """One step; the report's students tell no loss."""
        images, labels, draws = batch
        x = self._ctx.augment(to_float(images, self._ctx.device), draws)
        self.skips.note(self.step(x, labels))
        return {}

    @torch.no_grad()
    def loss(self, batch: Any) -> torch.Tensor:
        """Of a batch, as the network now is."""
        images, labels, _ = batch
        return F.cross_entropy(self._net(to_float(images, self._ctx.device)).float(), labels)

    def close(self) -> None:
        """Nothing to free."""


class Bench:
    """A context on a device, and files of earlier steps below ``scratch``, made up by whoever comes first."""

    def __init__(self, data: Path, scratch: Path, device: str, settings: Sequence[str]) -> None:
        argv = [
            "--preset",
            "cifar10",
            "--data",
            str(data),
            "--out",
            str(scratch / "out"),
            "--device",
            device,
            *settings,
        ]
        self.config = command_line.parse(argv).config
        switches = {name: getattr(self.config, name) for name in ("deterministic",) if exists(name)}
        self.world = World(self.config.device, self.config.timeout, **switches)
        manifest = Manifest.load(data)
        precision = agreed_precision(self.config, self.world)
        store = Store(scratch / "store")
        self.ctx = Context(self.config, self.world, data, manifest, store, scratch / "out", precision)
        scratch.mkdir(parents=True, exist_ok=True)
        self._trial = Trial(
            self.ctx, Meter(self.world), fingerprints(self.config, manifest, precision), scratch / "made-up"
        )
        self._work = scratch / "work"
        self._make_up()

    def _make_up(self) -> None:
        for step in ("teachers", "logits", "gaussian", "gan"):
            directory = self._trial.directories[step]
            if not directory.exists():
                part = directory.with_name(f"{step}.part")  # what a phase that fails leaves, the next must not read
                shutil.rmtree(part, ignore_errors=True)
                part.mkdir(parents=True)
                ESTIMATES[step][0](self._trial, part)
                if step == "logits":
                    _fill(part)
                part.rename(directory)

    @property
    def batch(self) -> dict[str, int]:
        """Images of a step of each kind."""
        c = self.config
        student = min(c.report.batch, max(c.report.ipc) * self.ctx.classes)
        return {"teachers": c.teachers.batch, "gan": c.gan.batch, "matching": c.matching.batch, "student": student}

    @contextmanager
    def trainee(self, step: str, architecture: str | None = None) -> Iterator[Any]:
        """What trains ``step``, at its first step."""
        made = self._built(step, architecture or self.config.teachers.architectures[0])
        made.monitor = SILENT
        try:
            yield made
        finally:
            made.close()

    def _built(self, step: str, architecture: str) -> Any:
        ctx, dirs = self.ctx, self._trial.directories
        if step == "teachers":
            return teachers.Pupil(ctx, Training(0, architecture, 0, 10_000, (10_000,)), self._work, SILENT, 0)
        if step == "gan":
            return gan.GanTraining(ctx, self._work, self._trial.inputs)
        if step == "matching":
            pool = matching.Pool(ctx, dirs["teachers"], dirs["logits"])
            return matching.Matching(ctx, self._work, pool, self._trial.inputs)
        return Student(ctx)


def _fill(directory: Path) -> None:
    """Logits of the size of a teacher's, a function of the file's name, where there were zeros."""
    for number, path in enumerate(sorted(directory.rglob("*.npy"))):
        values = np.load(path, mmap_mode="r+")
        drawn = normal(0, "bench/logits", number, np.arange(values.size // values.shape[-1]), values.shape[-1])
        values[...] = (drawn if path.name == MEANS else 4 * drawn).reshape(values.shape)
        values.flush()


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
