"""Hashes every file that a run will read before it reads any; the ranks share the work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gdd_dist.data.decoded_cache import decoded_files
from gdd_dist.data.remote import mirror_of
from gdd_dist.storage.store import verify_file
from gdd_dist.training.context import CACHE, Context
from sharding.manifest import SPLITS
from sharding.shards import verify_shard


def verify_inputs(ctx: Context, steps: Mapping[str, str], splits: Sequence[str] = SPLITS) -> None:
    """Check the shards of ``splits`` and the files of those of ``steps`` (step → fingerprint) that are finished.

    Raises UserError naming the first file that changed since it was written. All ranks call it.
    """
    shards = [info for name in splits if name in ctx.manifest.splits for info in ctx.manifest.splits[name].shards]
    done = [(step, fp) for step, fp in steps.items() if ctx.store.finished(step, fp)]
    files = [(*f, ctx.store.path(step, fp)) for step, fp in done for f in ctx.store.files(step, fp)]
    if ctx.config.loader.resident != "none":
        files += decoded_files(ctx.store.root / CACHE, ctx.manifest, splits)
    if (mirror := mirror_of(ctx.data)) is not None:
        # Each host has its own files; a missing file is checked when it is downloaded.
        for info in shards[ctx.world.local_rank :: ctx.world.local_size]:
            mirror.check(info)
        shards = []
    world = ctx.world
    # Hosts with their own disks check their own files.
    first, every = (world.rank, world.size) if ctx.disks.shared else (world.local_rank, world.local_size)
    mine = range(first, len(shards) + len(files), every)
    monitor = ctx.passing("verify", len(mine), unit="file")
    for n, i in enumerate(mine):
        world.check_stop()
        monitor.advance(n)
        if i < len(shards):
            verify_shard(ctx.data, shards[i])
        else:
            path, size, sha256, directory = files[i - len(shards)]
            verify_file(path, size, sha256, f"remove {directory} to compute it again")
    monitor.close()
    world.barrier()
