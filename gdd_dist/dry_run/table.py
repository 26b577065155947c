"""--dry-run: what a run would do and need, step by step, without doing it and without writing to OUT or STORE.

Counts follow from the settings, the manifest and finished steps; seconds and memory are measured on all ranks at once.
"""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from gdd_dist.config.ranks import idle
from gdd_dist.config.settings import Config
from gdd_dist.config.steps import STEPS, TABLE, fingerprints
from gdd_dist.dry_run.estimates import ESTIMATES
from gdd_dist.dry_run.trial import Trial
from gdd_dist.pipeline.dataset import data_or_digits
from gdd_dist.pipeline.preflight import check, fitted
from gdd_dist.pipeline.store_users import store_of
from gdd_dist.reporting.tables import aligned
from gdd_dist.runtime.memory import CUDA_CONTEXT
from gdd_dist.runtime.meter import Meter
from gdd_dist.runtime.world import World
from gdd_dist.storage.store import Store
from gdd_dist.training.context import Context, agreed_precision
from sharding.manifest import Manifest
from sharding.progress import duration
from sharding.sizes import size

RECORD_BYTES, ENTRY_BYTES = 800, 125
"""Bytes of a step's contents.json, and of one file's entry in it."""
COLUMNS = ("step", "status", "optimizer steps", "images forwarded", "to write", "memory per rank", "time")


@dataclass(frozen=True)
class Line:
    """A step's row of the table. ``memory``: a rank's peak in bytes; ``on_gpu``: the part of it that a GPU would hold."""

    step: str
    status: str
    steps: int = 0
    images: int = 0
    bytes: int = 0
    memory: float = 0.0
    on_gpu: float = 0.0
    seconds: float = 0.0


def show(world: World, config: Config) -> None:
    """Print the table. All ranks call it; raises the same UserErrors as the run."""
    out = Path(config.out or ".")
    with tempfile.TemporaryDirectory(prefix="gdd-dry-run-") as scratch:
        data, built = data_or_digits(config, out, Path(scratch))
        manifest = Manifest.load(data)
        config, changed = fitted(config, manifest)
        world.say(changed)
        check(config, manifest, world.size, world.device)
        precision = agreed_precision(config, world)
        ctx = Context(config, world, data, manifest, Store(store_of(out, config)), out, precision, keeps=False)
        trial = Trial(ctx, Meter(world), fingerprints(config, manifest, precision), Path(scratch))
        shards = Line("shards", "run", bytes=sum(sizes(data))) if built else Line("shards", "reused")
        lines = [shards, *estimated(trial)]
        if world.is_main:
            sys.stdout.write(f"{table(lines)}\n\n{notes(trial, lines)}\n")


def estimated(trial: Trial) -> list[Line]:
    """Return the rows of all steps up to --until."""
    ctx, fps = trial.ctx, trial.fps
    wanted = STEPS[1 : STEPS.index(ctx.config.until) + 1]
    todo = ctx.world.broadcast([s for s in wanted if not ctx.store.finished(s, fps[s])])
    for step in wanted if todo else ():
        trial.directories[step].mkdir()
        ESTIMATES[step][0](trial, trial.directories[step])
    return [_line(trial, step) if step in todo else Line(step, "reused") for step in wanted]


def _line(trial: Trial, step: str) -> Line:
    """Return the row of a step that has to run. On a CPU, memory-mapped files (images, shards, inputs) count as memory."""
    ctx, written, mapped = trial.ctx, sizes(trial.directories[step]), trial.meter.files
    resumes, steps, images, cost = ESTIMATES[step][1](trial, ctx.store.partial(step, trial.fps[step]))
    for name, split in ctx.manifest.splits.items():
        mapped += ctx.images(name).resident_bytes + sum(shard.bytes for shard in split.shards)
    mapped += sum(n for name in TABLE[step].shapes if name in TABLE for n in sizes(trial.directories[name]))
    memory = cost.memory + (mapped if ctx.device.type == "cpu" else 0)
    total = sum(written) + ENTRY_BYTES * len(written) + RECORD_BYTES
    return Line(step, "resumes" if resumes else "run", steps, images, total, memory, cost.on_gpu, cost.seconds)


def sizes(directory: Path) -> list[int]:
    """Return the size in bytes of each file below a directory."""
    return [f.stat().st_size for f in directory.rglob("*") if f.is_file()]


def table(lines: list[Line]) -> str:
    """Return the rows as plain text."""
    sums = {name: sum(getattr(o, name) for o in lines) for name in ("steps", "images", "bytes", "seconds")}
    total = Line("total", "", memory=max(o.memory for o in lines), **sums)
    cells = [
        (o.step, o.status, f"{o.steps:,}", f"{o.images:,}", size(o.bytes), size(o.memory), duration(o.seconds))
        for o in (*lines, total)
    ]
    return "\n".join(aligned([COLUMNS, *cells], left=2))


def notes(trial: Trial, lines: list[Line]) -> str:
    """Return the notes below the table: how it was measured, and what a GPU would need."""
    ctx, most = trial.ctx, max(lines, key=lambda line: line.on_gpu)
    if all(line.status == "reused" for line in lines):
        return "Every step is finished: a run would reuse them all."
    where = f"{ctx.world.size} rank{'s' if ctx.world.size > 1 else ''}, {ctx.device.type}, {ctx.precision}"
    text = f"Measured here on random weights: {where}; nothing was written to {ctx.out}."
    if waits := idle(ctx.config, ctx.world.size):
        text += f"\n{waits}."
    if trial.meter.extrapolated:
        text += "\nBatches too large or too slow to try here were extrapolated from two smaller batches."
    if ctx.device.type == "cpu" and most.on_gpu > 0:
        need = f"{size(most.on_gpu + CUDA_CONTEXT)} of GPU memory in {ctx.precision}"
        text += f"\nOn a GPU, a rank would need about {need} (step {most.step}; {size(CUDA_CONTEXT)} of it for CUDA itself)."
    return text
