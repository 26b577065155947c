"""A finished run, opened by a program that computes more from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from gdd_dist.config.settings import Config
from gdd_dist.config.steps import STEPS
from gdd_dist.pipeline.dataset import data_of
from gdd_dist.storage.store import CONTENTS, Store, made_from
from sharding.errors import UserError
from sharding.manifest import Manifest

if TYPE_CHECKING:  # a command line is read, and refused, without torch
    from gdd_dist.runtime.world import World
    from gdd_dist.training.context import Context


def finished_steps(out: Path, manifest: Manifest) -> tuple[Store, dict[str, str]]:
    """Return the store of OUT/matching/latest, and the fingerprints of that generator, of all its inputs, and of "data".

    Raises UserError if the run has no generator yet, lacks an input, or was made from another data set.
    """
    directory = (out / "matching" / "latest").resolve()
    if not (directory / CONTENTS).exists():
        raise UserError(f"{out} holds no finished generator; run gdd_dist.train with --out {out} to its end first")
    store = Store(directory.parent.parent)
    made = made_from(directory, "shards")
    fps = {step: made[step] for step in STEPS[1:] if step in made}
    if made["shards"] != manifest.fingerprint:
        what = f"the data set {manifest.name} {manifest.fingerprint} is not the one that {out} was trained on ({made['shards']})"
        raise UserError(f"{what}; give the original data set with --data")
    return store, {"data": manifest.fingerprint, **fps}


def opened(
    out: Path, config: Config, steps: Iterable[str], joined: Callable[[World], None]
) -> tuple[Context, dict[str, str], dict[str, Path]]:
    """Return (context, fingerprints of the generator's steps and of "data", directories of ``steps``), before any file is hashed.

    ``joined``: gets the World as soon as this rank has joined. Raises UserError for what is missing, and for report settings that do
    not fit the data set.
    """
    from gdd_dist.evaluation.rows import check
    from gdd_dist.runtime.world import World
    from gdd_dist.training.context import Context, agreed_precision

    data = data_of(out, config)
    manifest = Manifest.load(data)
    check(config, manifest)
    store, fps = finished_steps(out, manifest)
    directories = dict[str, Path]()
    for step in sorted(steps):
        if step not in fps:
            cure = "leave its row out of --baselines, or train again"
            raise UserError(f"the run was made by a version without the step {step}; {cure}")
        directories[step] = store.path(step, fps[step])
        if not store.finished(step, fps[step]):
            raise UserError(f"{directories[step]} is missing; run the same gdd_dist.train command again to compute it")
    world = World(config.device, config.timeout, config.deterministic)
    joined(world)
    ctx = Context(config, world, data, manifest, store, out, agreed_precision(config, world))
    return ctx, fps, directories
