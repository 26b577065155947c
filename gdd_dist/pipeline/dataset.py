"""Finds a run's data set: a directory, a mirror of a remote one, or the digits, built on first use."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from gdd_dist.config.settings import Config
from gdd_dist.data.location import is_remote, read_manifest
from sharding.manifest import FILE, Manifest

if TYPE_CHECKING:
    from gdd_dist.runtime.world import World

PATIENCE = 5.0
"""Seconds that a remote store may fail before its manifest is treated as missing."""


def data_of(out: Path, config: Config) -> Path:
    """Return the directory of a run's data set."""
    return data_directory(config) or out / "data"


def manifest_of(out: Path, config: Config) -> Manifest:
    """Return the manifest of a run's data set; nothing else is downloaded. Raises UserError when it cannot be read."""
    return read_manifest(config.data or str(out / "data"), min(PATIENCE, config.loader.patience))


def data_or_digits(config: Config, out: Path, scratch: Path) -> tuple[Path, bool]:
    """Return the data set, and whether the run will have to build it (the digits are then built in ``scratch``)."""
    if (data := data_directory(config)) is not None:
        return data, False
    if (out / "data" / FILE).exists():
        return out / "data", False
    from sharding.writer import build  # imported here, because few runs build a data set

    build("digits", scratch / "data")
    return scratch / "data", True


def data_directory(config: Config) -> Path | None:
    """Return the directory of --data on this host, a mirror if it is remote; None if --data is not given."""
    if config.data is None:
        return None
    if not is_remote(config.data):
        return Path(config.data)
    from gdd_dist.data.remote import Cache, open_data  # imported here, because most data sets are local

    loader = config.loader
    return open_data(config.data, Cache.of(loader.cache_dir, loader.cache_limit, loader.patience))


def prepare_data(world: World, config: Config, out: Path) -> tuple[Path, str]:
    """Return the data directory and its status; without --data the digits are built in OUT/data on first use."""
    if (data := data_directory(config)) is not None:
        return data, "reused"
    from sharding.writer import build

    reused = world.broadcast(build("digits", out / "data").reused if world.is_main else None)
    if world.local_rank == 0 and not (out / "data" / FILE).exists():  # this host does not share rank 0's disk
        build("digits", out / "data")
    world.barrier()
    return out / "data", "reused" if reused else "computed"
