"""The trainings of the pool, and their outputs: snapshots, and a record of each finished training."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from gdd_dist.config.settings import Config
from gdd_dist.models.classifiers import Classifier
from gdd_dist.models.files import save_network
from gdd_dist.runtime.monitor import say
from gdd_dist.storage.checkpoints import Checkpoints
from gdd_dist.storage.json_files import fingerprint, read_json, write_json
from gdd_dist.storage.store import CHECKPOINTS, verify_file
from gdd_dist.training.classifier_fit import accuracy
from gdd_dist.training.context import Context
from sharding.errors import UserError
from sharding.files import sha256_file


@dataclass(frozen=True)
class Training:
    """One training of the pool; ``snapshots``: step counts after which a teacher is kept, ascending, the last one last."""

    index: int
    architecture: str
    seed: int
    steps: int
    snapshots: tuple[int, ...]

    @property
    def name(self) -> str:
        """The name shown to the user."""
        return f"{self.architecture} seed {self.seed}"

    @property
    def purpose(self) -> str:
        """The purpose of its random numbers."""
        return f"teacher/{self.architecture}/{self.seed}"


def pool(config: Config, steps_per_epoch: int) -> list[Training]:
    """Return all trainings. Snapshots are at 1, 1/3, 1/9, … of a training, because early ones teach coarse structure."""
    t = config.teachers
    steps = t.epochs * steps_per_epoch
    marks = sorted({max(1, round(steps * 3.0**-k)) for k in range(t.snapshots)})
    pairs = [(a, s) for s in range(t.seeds) for a in t.architectures]
    return [Training(i, a, s, steps, tuple(marks)) for i, (a, s) in enumerate(pairs)]


def record_path(work: Path, training: Training) -> Path:
    """Return the path of a training's record, which exists when it is finished."""
    return work / CHECKPOINTS / f"training-{training.index:03d}.json"


def finished(work: Path, training: Training) -> dict[str, Any] | None:
    """Return the record of a finished training, else None; a damaged file is reported, and its training repeated."""
    path = record_path(work, training)
    if not path.exists():
        return None
    try:
        body = read_json(path, _checked, "its training is repeated")
        verify(work, body["teachers"])
    except UserError as e:
        tell(str(e))
        return None
    return body


def _checked(body: Any) -> dict[str, Any]:
    if body.pop("check") != fingerprint(body):
        raise ValueError("it does not fit its check")
    return dict(body)


@cache
def tell(fault: str) -> None:
    """Report a fault once, although a repeated training finds the same damaged file when it loads its checkpoint."""
    say(f"teachers: {fault}")


def verify(work: Path, records: list[dict[str, Any]]) -> None:
    """Raise UserError if a snapshot was changed since it was written."""
    for record in records:
        verify_file(work / record["file"], record["bytes"], record["sha256"], "its training is repeated")


def finish(work: Path, training: Training, records: list[dict[str, Any]], curve: list[list[float]]) -> None:
    """Write the record of a finished training: its snapshots, and its curve of points (step, loss, learning rate)."""
    record_path(work, training).parent.mkdir(exist_ok=True)
    body = {"teachers": records, "curve": curve}
    write_json(record_path(work, training), {**body, "check": fingerprint(body)})


def keep(ctx: Context, net: Classifier, training: Training, step: int, work: Path) -> dict[str, Any]:
    """Measure a snapshot on val and write it."""
    snapshot = training.snapshots.index(step)
    name = f"teacher-{training.index * len(training.snapshots) + snapshot:03d}.safetensors"
    score = accuracy(net, ctx.images("val"), ctx.device, ctx.precision)
    save_network(
        work / name,
        net,
        {"format": "gdd-classifier/1", "architecture": training.architecture, "data": ctx.manifest.fingerprint},
    )
    return {
        "file": name,
        "bytes": (work / name).stat().st_size,
        "sha256": sha256_file(work / name),
        "architecture": training.architecture,
        "seed": training.seed,
        "step": step,
        "snapshot": snapshot,
        "last": step == training.steps,
        "val_accuracy": score,
    }


class LeaderCheckpoints(Checkpoints):
    """Checkpoints of one training, in files of the team's leader, which every rank of the team loads."""

    def __init__(self, ctx: Context, training: Training, work: Path) -> None:
        config = ctx.config
        directory = record_path(work, training).with_suffix("")
        super().__init__(directory, config.checkpoint_seconds, say, config.checkpoints_kept)
        self._team, self._work = ctx.team, work

    def load(self) -> tuple[int, dict[str, Any]] | None:
        """Return the newest intact checkpoint, if the snapshots before it are intact, too."""
        found: tuple[int, dict[str, Any]] | None = None
        if self._team.is_main:
            found = super().load()
            try:
                verify(self._work, found[1]["records"] if found else [])
            except UserError as e:
                tell(str(e))
                found = None
        if self._team.size == 1:
            return found
        buffer = io.BytesIO()
        torch.save(found, buffer)
        sent: tuple[int, dict[str, Any]] | None
        sent = torch.load(io.BytesIO(self._team.send(buffer.getvalue())), map_location="cpu", weights_only=True)
        return sent
