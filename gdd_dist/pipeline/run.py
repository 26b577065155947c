"""A run: one step after another; a finished step is reused, any other is computed under its lock."""

import datetime
import sys
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from gdd_dist.config import command_line as configuration
from gdd_dist.config.ranks import idle, taking_part
from gdd_dist.config.settings import Config
from gdd_dist.config.steps import STEPS, TABLE, Inputs, fingerprints
from gdd_dist.models.classifiers import CONSTANT
from gdd_dist.pipeline.images_expected import images_expected
from gdd_dist.pipeline.preflight import check, fitted, verify_inputs
from gdd_dist.pipeline.store_users import note_user, store_of
from gdd_dist.reporting.tables import table
from gdd_dist.runtime.file_exchange import Disks
from gdd_dist.runtime.locks import Lock, holding, in_use
from gdd_dist.runtime.monitor import Outlook, say, write_text
from gdd_dist.runtime.versions import commit, versions
from gdd_dist.runtime.world import World
from gdd_dist.storage.json_files import read_json
from gdd_dist.storage.store import CHECKPOINTS, Store, clean, link_latest, write_records
from gdd_dist.training.context import Context, OnInterval, agreed_precision
from sharding.errors import UserError
from sharding.files import write_atomic
from sharding.manifest import Manifest
from sharding.redact import redact


def run_lock(world: World, out: Path) -> AbstractContextManager[None]:
    """Rank 0 locks OUT, so that a second job is refused. For a holder on another host, wait a minute for signs of life."""
    lock, told = Lock(out / "run.lock"), False

    def busy(holder: Mapping[str, Any]) -> None:
        nonlocal told
        world.check_stop()
        if holder["local"] or lock.moved:
            raise in_use(out, holder)
        if not told:
            who = f"process {holder['pid']} on {holder['host']}"
            say(f"{out} is locked by {who}; waiting a minute to see whether that process is still running")
        told = True

    return holding(lock, busy) if world.is_main else nullcontext()


def find_disks(ctx: Context) -> Disks:
    """Find out which ranks share rank 0's disk. Raises UserError if hosts have different data."""
    known = ctx.world.gather(ctx.manifest.fingerprint)
    if other := [r for r, fp in enumerate(known) if fp != known[0]]:
        where = f"hosts (ranks 0 and {other[0]})"
        raise UserError(f"{ctx.data} differs between {where}; copy the same data set to all of them")
    disks = Disks(ctx.world, ctx.store.root)
    if ctx.world.is_main and not disks.shared:
        say(f"{len(disks.apart)} ranks cannot see {ctx.store.root} of rank 0: finished files are sent to their hosts")
    return disks


def run(
    world: World,
    config: Config,
    preset: str,
    data: Path,
    out: Path,
    shards: tuple[str, float] = ("reused", 0.0),
    on_interval: OnInterval | None = None,
) -> None:
    """Run all steps up to --until. ``shards``: status and seconds of the data set; ``on_interval``: called by matching."""
    manifest = Manifest.load(data)
    config, changed = fitted(config, manifest)
    world.say(changed)
    precision = agreed_precision(config, world)
    check(config, manifest, world.size, world.device)
    world.say(idle(config, world.size))
    store = Store(store_of(out, config))
    ctx = Context(config, world, data, manifest, store, out, precision, on_interval=on_interval)
    ctx.disks = find_disks(ctx)
    if constant := [str(c) for c, s in enumerate(manifest.std) if 2 * s <= CONSTANT]:
        same = f"channel {', '.join(constant)} is constant in train"
        world.say(f"data: {same}; its standard deviation is set to 1")
    fps = fingerprints(config, manifest, precision)
    if world.is_main:
        write_config(out, configuration.to_yaml(config, preset))
        note_user(store.root, out)
    last = STEPS.index(config.until)
    begin = time.monotonic()
    world.enter("verify")
    if config.verify:
        verify_inputs(ctx, {step: fps[step] for step in STEPS[1 : last + 1]})
    expected = images_expected(ctx, fps, STEPS[1 : last + 1])
    ctx.outlook = outlook = Outlook(expected, lambda: ctx.forwards * ctx.world.size)
    records = {}
    for step in STEPS[: last + 1]:
        if step == "shards":
            records[step] = record(fps[step], shards[0], shards[1] + time.monotonic() - begin, 0)
        else:
            outlook.begin(step)
            records[step] = run_step(ctx, step, fps)
            outlook.end(step)
        if world.is_main:
            write_records(out, records)
    if world.is_main and config.until == "report":
        finish(ctx, fps)


def write_config(out: Path, text: str) -> None:
    """Write OUT/config.yaml, and the same text to TensorBoard, without the secrets of URLs."""
    path, text = out / "config.yaml", redact(text)
    if not path.exists() or path.read_text("utf-8", "replace") != text:
        from gdd_dist.runtime.tensorboard_layout import write_layout  # imported here: only rank 0 needs TensorBoard

        write_text(out / "tensorboard" / "config", "config", text)
        write_layout(out / "tensorboard" / "overview")
        write_atomic(path, text.encode())


def record(fp: str, status: str, seconds: float, images: int) -> dict[str, Any]:
    """Return a step's entry in steps.json."""
    return {"fingerprint": fp, "status": status, "seconds": round(seconds, 2), "images_processed": images}


def run_step(ctx: Context, step: str, fps: Mapping[str, str]) -> dict[str, Any]:
    """Reuse the finished step, or compute it under its lock. Returns its record for steps.json."""
    fp, begin = fps[step], time.monotonic()
    ctx.world.enter(step)
    status, ctx.forwards, ctx.resumed = "reused", 0, False
    with step_lock(ctx, step, fp):
        if not ctx.world.broadcast(ctx.store.finished(step, fp)):
            compute(ctx, step, fps)
            status = "resumed" if any(ctx.world.gather(ctx.resumed)) else "computed"
        elif ctx.world.is_main:
            ctx.store.drop_checkpoints(step, fp)
    if any(step in other.inputs(ctx.config) for other in TABLE.values()):
        ctx.disks.bring(ctx.store, step, fp)
    if ctx.world.is_main:
        link_latest(ctx.out, step, ctx.store.path(step, fp))
        say(f"{step}: {status} {fp} ({time.monotonic() - begin:.1f} s)")
    images = ctx.world.sum(ctx.forwards)
    return record(fp, status, time.monotonic() - begin, images)


def step_lock(ctx: Context, step: str, fp: str) -> AbstractContextManager[None]:
    """Rank 0 holds the artifact while it is being written; another run that needs it waits."""
    if not ctx.world.is_main or ctx.store.finished(step, fp):
        return nullcontext()
    told = False

    def busy(holder: Mapping[str, Any]) -> None:
        nonlocal told
        ctx.world.check_stop()
        if not told:
            who = f"process {holder['pid']} on {holder['host']}"
            say(f"{step}: waiting for {who}, which has been computing it since {holder['since']}")
        told = True

    return holding(Lock(ctx.store.root / step / f"{fp}.lock"), busy)


def compute(ctx: Context, step: str, fps: Mapping[str, str]) -> None:
    """Run the step in its .partial directory, which rank 0 renames when all ranks are done."""
    work = ctx.store.partial(step, fps[step])
    (work / CHECKPOINTS).mkdir(parents=True, exist_ok=True)  # on every rank, because hosts may have their own disks
    if ctx.world.is_main:
        clean(work)
    ctx.world.barrier()
    begin, origin = time.monotonic(), provenance(ctx, fps)
    directories = {name: ctx.store.path(name, fps[name]) for name in TABLE[step].inputs(ctx.config)}
    info = {}
    with ctx.among(taking_part(ctx.config, step, ctx.world.size)) as here:
        if here:
            info = TABLE[step].run(ctx, work, Inputs(directories, fps, origin))
    images = ctx.world.sum(ctx.forwards)
    cost = {"seconds": round(time.monotonic() - begin, 2), "images_processed": images, "ranks": ctx.world.size}
    if ctx.world.is_main:
        contents = {"info": info, "provenance": origin, "cost": cost}
        ctx.store.finish(step, fps[step], contents, ctx.world.check_stop)
    ctx.world.barrier()


def provenance(ctx: Context, fps: Mapping[str, str]) -> dict[str, Any]:
    """Return what a file was made from: fingerprints, settings, commit, versions."""
    return {
        "fingerprints": dict(fps),
        "data": ctx.manifest.name,
        "precision": ctx.precision,
        "seed": ctx.config.seed,
        "commit": commit(),
        "versions": versions(),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def finish(ctx: Context, fps: Mapping[str, str]) -> None:
    """Print the table of results, and the paths of report, generator and TensorBoard."""
    directory = ctx.store.path("report", fps["report"])
    shown = read_json(directory / "metrics.json", lambda metrics: table(metrics["results"]))
    latest = ctx.out / "report" / "latest"
    lines = (
        f"\n{shown}\n\nreport: {latest}/report.md",
        f"page: {latest}/report.html (the same with its pictures, in one file)",
        f"generator: {ctx.out}/matching/latest/generator.safetensors",
        f"TensorBoard: tensorboard --logdir {ctx.out}/tensorboard",
    )
    sys.stdout.write("\n".join(lines) + "\n")
