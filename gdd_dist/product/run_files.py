"""What a sampler reads of a finished run, checked before use."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from gdd_dist.models.files import read_teachers
from gdd_dist.models.generator import ImageGenerator
from gdd_dist.storage.json_files import again
from sharding.errors import UserError

if TYPE_CHECKING:  # only soft labels need the teachers
    from gdd_dist.models.classifiers import Classifier


def verify(directory: Path, *names: str) -> None:
    """Raise UserError if files of a finished step changed since they were written."""
    from gdd_dist.storage.store import files_of, verify_file

    files = files_of(directory)
    for name in names:
        if name not in files:
            raise UserError(f"{directory / name} is not a file of its step; {again(directory / name)}")
        verify_file(directory / name, *files[name], again(directory / name))


def load_teachers(step: Path, net: ImageGenerator, device: torch.device) -> list[Classifier]:
    """Return the last snapshots of the teachers of a finished matching step, frozen. Raises UserError if they are missing."""
    from gdd_dist.storage.store import Store, made_from

    fp = made_from(step, "teachers")["teachers"]
    store = Store(step.parent.parent)
    if not store.finished("teachers", fp):
        raise UserError(f"{store.path('teachers', fp)} is missing; run the same gdd_dist.train again to compute it")
    chosen = [t for t in read_teachers(store.path("teachers", fp)) if t.last]
    verify(store.path("teachers", fp), *(t.path.name for t in chosen))
    return [t.load(net.channels, net.size, net.classes).to(device) for t in chosen]
