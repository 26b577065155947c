"""Where a run's data set lies: a directory, a mirror of a remote one, or the digits, built on first use."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from gdd_dist.config.settings import Config
from gdd_dist.data.location import is_remote, read_manifest
from sharding.manifest import FILE, Manifest

if TYPE_CHECKING:
    from gdd_dist.runtime.world import World

PATIENCE = 5.0
"""Seconds that the store of a remote data set may fail before its manifest counts as not there."""


def data_of(out: Path, config: Config) -> Path:
    """The data set of a run."""
    return data_directory(config) or out / "data"


def manifest_of(out: Path, config: Config) -> Manifest:
    """The manifest of a run's data set, without fetching more of it. Raises UserError when it cannot be read."""
    return read_manifest(config.data or str(out / "data"), min(PATIENCE, config.loader.patience))


def data_or_digits(config: Config, out: Path, scratch: Path) -> tuple[Path, bool]:
    """The data set, and whether the run will have to build it (then the digits are built in ``scratch``)."""
    if (data := data_directory(config)) is not None:
        return data, False
    if (out / "data" / FILE).exists():
        return out / "data", False
    from sharding.writer import build  # few runs build

    build("digits", scratch / "data")
    return scratch / "data", True


def data_directory(config: Config) -> Path | None:
    """Where --data lies on this host, a mirror if it is remote; None where it is not given."""
    if config.data is None:
        return None
    if not is_remote(config.data):
        return Path(config.data)
    from gdd_dist.data.remote import Cache, open_data  # most data sets are on a disk

    loader = config.loader
    return open_data(config.data, Cache.of(loader.cache_dir, loader.cache_limit, loader.patience))


def prepare_data(world: World, config: Config, out: Path) -> tuple[Path, str]:
    """The data directory and its status; without --data the digits are built in OUT/data on first use."""
    if (data := data_directory(config)) is not None:
        return data, "reused"
    from sharding.writer import build

    reused = world.broadcast(build("digits", out / "data").reused if world.is_main else None)
    if world.local_rank == 0 and not (out / "data" / FILE).exists():  # a host with a disk of its own
        build("digits", out / "data")
    world.barrier()
    return out / "data", "reused" if reused else "computed"
