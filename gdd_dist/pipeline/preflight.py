"""Checks before the first step: settings, data set and ranks fit together, and no file that will be read was changed."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from gdd_dist.config.settings import Config
from gdd_dist.data.decoded_cache import decoded_files
from gdd_dist.data.remote import mirror_of
from gdd_dist.engines import deepspeed_config
from gdd_dist.engines.deepspeed_engine import import_deepspeed
from gdd_dist.evaluation import rows
from gdd_dist.models import pretrained, pretrained_networks
from gdd_dist.models.classifiers import has_batch_norm, parse_classifier, parse_student
from gdd_dist.models.residual import side_widths
from gdd_dist.pipeline.memory_needed import check_memory
from gdd_dist.storage.store import verify_file
from gdd_dist.training.context import CACHE, Context
from sharding.errors import UserError
from sharding.manifest import SPLITS, Manifest
from sharding.shards import verify_shard


def fitted(config: Config, manifest: Manifest) -> tuple[Config, str]:
    """Return the settings with batches of at most the training images, and a line about what was changed, empty if nothing was.

    A set may have fewer images than a preset's batch. The batch is then the largest power of two that the set fills.
    """
    samples = manifest.splits["train"].samples if "train" in manifest.splits else 0
    most = 1 << max(0, samples.bit_length() - 1)
    large = {name: getattr(config, name).batch for name in ("teachers", "gan") if getattr(config, name).batch > samples}
    for name in large:
        config = replace(config, **{name: replace(getattr(config, name), batch=most)})
    changed = ", ".join(f"--{name}.batch {batch} becomes {most}" for name, batch in large.items())
    return config, f"data: only {samples} training images: {changed}" if large else ""


def check(config: Config, manifest: Manifest, world: int, device: torch.device) -> None:
    """Raise UserError for the first fault."""
    check_engine(config, device)
    for split in ("train", "val", "test"):
        if split not in manifest.splits:
            raise UserError(f"the data set has no {split} split; build it with python -m sharding build")
    if manifest.height != manifest.width:
        cure = "build the data set with --image-size to make them square"
        raise UserError(f"images are {manifest.height}x{manifest.width}; {cure}")
    if len(manifest.classes) < 2:
        what = f"{manifest.name} has only one class, so there is nothing to classify"
        raise UserError(f"{what}; build it with two or more classes")
    side_widths(manifest.height, config.gan.width, config.gan.patch)
    for name in () if config.teachers.pretrained else config.teachers.architectures:
        parse_classifier(name)
    parse_student(config.matching.quick_student)
    check_ranks(config, world)
    check_memory(config, manifest, world, device)
    for file in pretrained.files(config.teachers.pretrained) if config.teachers.pretrained else ():
        pretrained_networks.load(file, manifest)
    if not config.teachers.pretrained:
        check_teams(config, world)
    rows.check(config, manifest)


def check_ranks(config: Config, world: int) -> None:
    """Micro-batches must divide the batches of gan and matching; DeepSpeed needs all ranks, while some may wait with DDP."""
    gan, streams, groups = config.gan.batch, config.streams("gan"), config.matching.batch // config.matching.group
    if gan % streams:
        raise UserError(f"--loader.streams {streams} does not divide --gan.batch {gan}; change one of them")
    of_matching = f"groups of --matching.batch {config.matching.batch}"
    for whole, of in ((gan, f"images of --gan.batch {gan}"), (groups, of_matching)):
        if whole % config.accumulate:
            what = f"--accumulate {config.accumulate} does not divide the {whole} {of}"
            raise UserError(f"{what}; use {_divisors(whole)}")
        if config.engine == "deepspeed" and whole // config.accumulate % world:
            cure = f"use {_divisors(whole // config.accumulate)} ranks, or --engine ddp, which lets some ranks wait"
            raise UserError(f"{world} ranks do not divide the {whole} {of}; {cure}")


def check_teams(config: Config, world: int) -> None:
    """Teams must divide the ranks, a team's ranks the streams of its batch, and micro-batches a rank's share of the batch."""
    t, streams = config.teachers, config.streams("teachers")
    team, share = f"--teachers.ranks_per_teacher {t.ranks_per_teacher}", t.batch // t.ranks_per_teacher
    if world % t.ranks_per_teacher:
        raise UserError(f"{team} does not divide the {world} ranks; use {_divisors(world)}")
    if streams % t.ranks_per_teacher:
        what = f"{team} does not divide the {streams} streams of --teachers.batch {t.batch}"
        raise UserError(f"{what}; use {_divisors(streams)}")
    if share % t.accumulate:
        what = f"--teachers.accumulate {t.accumulate} does not divide a rank's {share} images of a teacher's batch"
        raise UserError(f"{what}; use {_divisors(share)}")
    if share == t.accumulate and any(has_batch_norm(name) for name in t.architectures):
        raise UserError("batch normalization needs micro-batches of two or more images; lower --teachers.accumulate")


def check_engine(config: Config, device: torch.device) -> None:
    """DeepSpeed must be installed, and its file must set nothing that changes results."""
    if config.engine == "deepspeed":
        import_deepspeed(device)
        deepspeed_config.read(config.deepspeed_config)
    elif config.deepspeed_config is not None:
        raise UserError("--deepspeed-config needs --engine deepspeed; give both or neither")


def _divisors(n: int) -> str:
    sizes = [str(d) for d in range(1, n + 1) if n % d == 0]
    return ", ".join(sizes[:-1]) + " or " + sizes[-1] if len(sizes) > 1 else sizes[0]


def verify_inputs(ctx: Context, steps: Mapping[str, str], splits: Sequence[str] = SPLITS) -> None:
    """Hash the shards of ``splits`` and the files of those of ``steps`` (step → fingerprint) that are finished; the ranks share the work.

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
