"""Quick students: they measure how good a generator is, on val, never on test."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gdd_dist.data.augment import AUGMENT_DRAWS
from gdd_dist.data.images import to_float
from gdd_dist.data.noise import uniform
from gdd_dist.data.order import dealt
from gdd_dist.models.files import GENERATOR, read_network
from gdd_dist.models.generator import ImageGenerator
from gdd_dist.storage.json_files import ALONE, read_json, write_json
from gdd_dist.training.classifier_fit import accuracy, predict, student_step
from gdd_dist.training.context import Context
from gdd_dist.training.drawing import draw
from gdd_dist.training.skipped_steps import Diverged, Skips
from sharding.errors import UserError

FRESH_IMAGES = 500
CHUNK = 20
READINGS = 5


@dataclass(frozen=True)
class Measurement:
    """The quick students' results for a generator. Accuracies in percent; ``stderr``: of ``val`` over students.

    ``gap``: accuracy on fresh generated images minus accuracy on val. It grows when the generator encodes the class as a pattern
    that only students trained on such images recognize.
    """

    step: int
    val: float
    stderr: float
    gap: float

    def scalars(self) -> dict[str, float]:
        """Return the values by their names in TensorBoard."""
        return {"val_accuracy": self.val, "val_stderr": self.stderr, "shortcut_gap": self.gap}

    def as_dict(self) -> dict[str, Any]:
        """Return the values for JSON and checkpoints."""
        return dataclasses.asdict(self)


def best(history: Sequence[Mapping[str, Any]], select: str) -> Mapping[str, Any] | None:
    """Return the interval whose generator is kept: the first with the best val, or the last; None without measurements."""
    if not history:
        return None
    return history[-1] if select == "last" else max(history, key=lambda h: h["val"])


INTERVAL = "matching"
"""The name of a candidate that is an interval of matching."""


@dataclass(frozen=True)
class Candidates:
    """The candidates from which matching chooses its generator, with their measurements.

    ``history``: its intervals by step, first the generator that it starts from; ``others``: candidates that it does not train, by name.
    """

    history: Sequence[Mapping[str, Any]] = ()
    others: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, matching: Path) -> Candidates:
        """Read the candidates from the generator's file in the directory of the finished step ``matching``."""
        meta = read_network(matching / GENERATOR)[1]
        return cls(meta.get("history", []), meta.get("others", {}))

    def kept(self, select: str) -> tuple[str, Mapping[str, Any]] | None:
        """Return name and measurement of the candidate that is kept: the best on val (intervals first), or the last interval.

        None without measurements.
        """
        interval = best(self.history, select)
        if interval is None:
            return None
        found = [(INTERVAL, interval), *(self.others.items() if select == "best" else ())]
        return max(found, key=lambda one: one[1]["val"])


def measure(ctx: Context, generator: ImageGenerator, step: int, seed: int) -> Measurement:
    """Train the quick students on fresh draws; ranks share them; random numbers follow from ``seed`` alone. All ranks call it."""
    m = ctx.config.matching
    mine: list[list[float]] = []
    # A free rank takes the next student, so the number that rank 0 trains is known only at the end.
    monitor = ctx.passing("matching: quick students", -(-m.quick_students // ctx.world.size) * m.quick_steps)

    def tick(steps: int) -> None:
        monitor.advance(min(len(mine) * m.quick_steps + steps, monitor.total))

    try:
        for j in ctx.world.queue(m.quick_students):
            mine.append([j, *student(ctx, generator, j, seed, tick)])
    except Diverged as e:
        raise UserError(f"matching: quick student: {e}; lower --report.lr") from e
    monitor.close()
    results = sorted(r for rank in ctx.world.gather(mine) for r in rank)
    val, fresh = np.array([r[1] for r in results]), np.array([r[2] for r in results])
    stderr = float(val.std(ddof=1) / len(val) ** 0.5) if len(val) > 1 else 0.0
    return Measurement(step, float(val.mean()), stderr, float((fresh - val).mean()))


def measure_once(ctx: Context, path: Path, build: Callable[[], ImageGenerator], seed: int) -> Measurement:
    """``measure`` the result of ``build``; kept in ``path``, so that an interrupted step repeats neither. All ranks call it."""
    kept = None
    if ctx.world.is_main and path.exists():
        kept = read_json(path, lambda found: Measurement(**found).as_dict(), ALONE)
    if (kept := ctx.world.broadcast(kept)) is not None:
        ctx.resumed = True
        return Measurement(**kept)
    result = measure(ctx, ctx.watch(build()).eval(), 0, seed)
    if ctx.world.is_main:
        write_json(path, result.as_dict())
    return result


def student(
    ctx: Context, generator: ImageGenerator, j: int, seed: int, tick: Callable[[int], None]
) -> tuple[float, float]:
    """Return (accuracy on val, on fresh generated images) of quick student ``j`` in percent; ``tick``: reports steps done."""
    m = ctx.config.matching
    net = ctx.classifier(m.quick_student, seed, f"quick/{j}")
    step, skips = student_step(ctx, net, ctx.config.report.lr), Skips()
    scores, readings = list[float](), measured_after(m.quick_steps)
    for first in range(0, m.quick_steps, CHUNK):
        ctx.world.check_stop()
        steps = min(CHUNK, m.quick_steps - first)
        places = np.arange(first * m.quick_batch, (first + steps) * m.quick_batch)
        labels = dealt(seed, f"quick/{j}/labels", places, ctx.classes)
        images = to_float(draw(ctx, generator, labels, seed, f"quick/{j}", first), ctx.device)
        draws = [
            uniform(seed, f"quick/{j}/augment", first + k, np.arange(m.quick_batch), AUGMENT_DRAWS)
            for k in range(steps)
        ]
        targets, of_all = ctx.sent((torch.from_numpy(labels), torch.from_numpy(np.concatenate(draws))))
        for k in range(steps):
            part = slice(k * m.quick_batch, (k + 1) * m.quick_batch)
            x = ctx.augment(images[part], of_all[part])
            skips.note(step(x, targets[part]))
            if first + k + 1 in readings:
                scores.append(accuracy(net, ctx.images("val"), ctx.device, ctx.precision))
        tick(first + steps)
    skips.settle()
    labels = np.arange(FRESH_IMAGES) % ctx.classes
    fresh = draw(ctx, generator, labels, seed, f"quick/{j}/fresh", 0)
    logits = predict(net, lambda indices: fresh[torch.from_numpy(indices)], FRESH_IMAGES, ctx.device, ctx.precision)
    on_fresh = 100.0 * float((logits.argmax(1).numpy() == labels).mean())
    return float(np.mean(scores)), on_fresh


def measured_after(steps: int) -> set[int]:
    """Return the steps after which a quick student is measured: five in its last fifth, including the last step, because a
    single measurement is noisy at a constant learning rate.
    """
    return {steps - round(k * steps / 25) for k in range(READINGS)}


def forwards(ctx: Context) -> tuple[int, int, int]:
    """Return the numbers of images for one quick student: trained on, drawn, and forwarded when it is measured."""
    m = ctx.config.matching
    trained = m.quick_steps * m.quick_batch
    return trained, trained + FRESH_IMAGES, len(measured_after(m.quick_steps)) * len(ctx.images("val")) + FRESH_IMAGES
