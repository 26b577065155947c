"""--dry-run: what a run would do and need, step by step, without doing it and without writing to OUT or STORE.

Counts follow from settings, manifest and what is finished already. Seconds and memory are measured here, on all ranks at once
(see step_costs), at each rank's share of the batch.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gdd_dist.config.settings import Config
from gdd_dist.config.steps import STEPS
from gdd_dist.data.logit_cache import bytes_needed
from gdd_dist.dry_run.cost_of_steps import StepCosts
from gdd_dist.dry_run.meter import CUDA_CONTEXT, Meter
from gdd_dist.dry_run.placeholder_inputs import MadeUp
from gdd_dist.dry_run.work_left import gan_left, logits_left, matching_left, report_left, teachers_left, trainings_left
from gdd_dist.models.files import GENERATOR, TEACHERS
from gdd_dist.pipeline.dataset import data_or_digits
from gdd_dist.pipeline.fingerprints import fingerprints
from gdd_dist.pipeline.preflight import check
from gdd_dist.pipeline.store_users import store_of
from gdd_dist.runtime.world import World
from gdd_dist.storage.json_files import read_json
from gdd_dist.storage.store import Store
from gdd_dist.training.context import Context, agreed_precision
from sharding.manifest import Manifest
from sharding.progress import duration

PROVENANCE_BYTES, ENTRY_BYTES = 800, 125
"""Of the provenance that a step records, and of a file in its list of files."""


@dataclass(frozen=True)
class Line:
    """A step's line of the table. ``memory``: a rank's peak in bytes; ``on_gpu``: the part of it that a GPU would hold."""

    step: str
    status: str
    steps: int = 0
    images: int = 0
    bytes: int = 0
    memory: float = 0.0
    on_gpu: float = 0.0
    seconds: float = 0.0


def show(world: World, config: Config) -> None:
    """Print the table. All ranks call it; raises UserError as the run would."""
    out = Path(config.out or ".")
    with tempfile.TemporaryDirectory(prefix="gdd-dry-run-") as scratch:
        data, built = data_or_digits(config, out, Path(scratch))
        manifest = Manifest.load(data)
        check(config, manifest, world.size, world.device)
        precision = agreed_precision(config, world)
        store = Store(store_of(out, config))
        ctx = Context(config, world, data, manifest, store, out, precision, keeps=False)
        fps = fingerprints(config, manifest, precision)
        meter = Meter(world)
        shards = sum(f.stat().st_size for f in data.rglob("*") if f.is_file()) if built else 0
        lines = [Line("shards", "run" if built else "reused", bytes=shards), *estimate(ctx, fps, meter, Path(scratch))]
        if world.is_main:
            sys.stdout.write(f"{table(lines)}\n\n{notes(ctx, lines, meter)}\n")


def estimate(ctx: Context, fps: Mapping[str, str], meter: Meter, scratch: Path) -> list[Line]:
    """The lines of all steps up to --until."""
    wanted = STEPS[1 : STEPS.index(ctx.config.until) + 1]
    todo = ctx.world.broadcast([s for s in wanted if not ctx.store.finished(s, fps[s])])
    if not todo:
        return [Line(step, "reused") for step in wanted]
    made_up = MadeUp(ctx, scratch)
    costs, lines = StepCosts(ctx, meter, made_up), []
    for step in wanted:
        if step in todo:
            lines.append(measured(ctx, step, fps, meter, costs, made_up))
        else:
            lines.append(Line(step, "reused"))
    return lines


def measured(ctx: Context, step: str, fps: Mapping[str, str], meter: Meter, costs: StepCosts, made_up: MadeUp) -> Line:
    """The line of a step that has to run."""
    work = ctx.store.partial(step, fps[step])
    sizes: dict[str, int] = {}
    if step == "teachers":
        trainings = trainings_left(ctx, work)
        left, cost = teachers_left(ctx, trainings), costs.teachers(trainings)
    elif step == "logits":
        left = logits_left(ctx, work, made_up.pool)
        cost = costs.logits(left.images)
    elif step == "gan":
        left, grids = gan_left(ctx, work)
        cost = costs.gan(left.steps, grids)
    elif step == "matching":
        left, measurements = matching_left(ctx, work)
        cost = costs.matching(left.steps, measurements, made_up.gan.parent / "matching")
    else:
        left, students = report_left(ctx, work, fps)
        cost, sizes = costs.report(students, fps)
    sizes = sizes or files(ctx, step, made_up)
    written = sum(sizes.values()) + ENTRY_BYTES * len(sizes) + PROVENANCE_BYTES
    memory = cost.memory + (meter.files + mapped(ctx, step, made_up) if ctx.device.type == "cpu" else 0)
    status = "resumes" if left.resumes else "run"
    return Line(step, status, left.steps, left.images, written, memory, cost.on_gpu, cost.seconds)


def files(ctx: Context, step: str, made_up: MadeUp) -> dict[str, int]:
    """Name → bytes of what a step but the report leaves behind."""
    meta = PROVENANCE_BYTES + len(json.dumps(ctx.manifest.classes))
    if step == "teachers":
        listed = read_json(made_up.teachers / TEACHERS)["teachers"]
        sizes = {f"{i}": (made_up.teachers / r["file"]).stat().st_size for i, r in enumerate(listed)}
        return {**sizes, TEACHERS: (made_up.teachers / TEACHERS).stat().st_size}
    if step == "logits":
        counts, classes = ctx.images("train").shards.shard_samples, ctx.classes
        needed = bytes_needed(counts, made_up.pool, ctx.config.logits.views, classes)
        return {"all": needed + 2 * ENTRY_BYTES * made_up.pool * len(counts)}
    sizes = {path.name: path.stat().st_size for path in made_up.gan.iterdir()}
    if step == "gan":
        return {**sizes, GENERATOR: sizes[GENERATOR] + meta}
    measurements = ctx.config.matching.steps // ctx.config.matching.interval + 2
    return {GENERATOR: sizes[GENERATOR] + meta + 100 * measurements}


def mapped(ctx: Context, step: str, made_up: MadeUp) -> int:
    """Host memory that fills as a step goes on: images kept once decoded, files mapped."""
    splits = ("train", "val", "test") if step == "report" else ("train", "val")
    size = sum(ctx.images(s).resident_bytes + sum(i.bytes for i in ctx.manifest.splits[s].shards) for s in splits)
    if step == "matching":
        counts = ctx.images("train").shards.shard_samples
        cache = bytes_needed(counts, made_up.pool, ctx.config.logits.views, ctx.classes)
        size += min(cache, ctx.config.matching.steps * ctx.config.matching.batch // ctx.world.size * 2**16)
    return size


COLUMNS = ("step", "status", "optimizer steps", "images forwarded", "to write", "memory a rank", "time")


def table(lines: list[Line]) -> str:
    """The lines as plain text."""
    total = Line(
        "total",
        "",
        sum(line.steps for line in lines),
        sum(line.images for line in lines),
        sum(line.bytes for line in lines),
        max(line.memory for line in lines),
        seconds=sum(line.seconds for line in lines),
    )
    cells = [COLUMNS]
    for line in (*lines, total):
        numbers = (f"{line.steps:,}", f"{line.images:,}", size(line.bytes), size(line.memory), duration(line.seconds))
        cells.append((line.step, line.status, *numbers))
    widths = [max(len(row[i]) for row in cells) for i in range(len(COLUMNS))]
    return "\n".join(
        "  ".join(
            c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )


def notes(ctx: Context, lines: list[Line], meter: Meter) -> str:
    """How to read the table, and what a GPU would need."""
    if all(line.status == "reused" for line in lines):
        return "Every step is finished: a run would reuse them all."
    ranks = f"{ctx.world.size} rank{'s' if ctx.world.size > 1 else ''}"
    text = [
        f"Measured here on random weights: {ranks}, {ctx.device.type}, {ctx.precision}; nothing was written to {ctx.out}."
    ]
    if meter.extrapolated:
        text.append("Batches too large or slow to try here were continued from two smaller ones.")
    largest = max(lines, key=lambda line: line.on_gpu)
    if ctx.device.type == "cpu" and largest.on_gpu > 0:
        need = size(largest.on_gpu + CUDA_CONTEXT)
        text.append(
            f"On GPUs a rank would need about {need} of GPU memory in {ctx.precision} "
            f"({largest.step}; {size(CUDA_CONTEXT)} of it for CUDA itself)."
        )
    return "\n".join(text)


def size(n: float) -> str:
    """Bytes in words."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n >= scale:
            return f"{n / scale:.1f} {unit}" if n < 100 * scale else f"{n / scale:.0f} {unit}"
    return f"{n:.0f} B" if n else "0"
