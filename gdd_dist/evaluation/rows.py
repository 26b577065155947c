"""The report's rows: what students train on, their budgets and fingerprints. Pure functions.

A row is a student architecture trained on one kind of images by one protocol with one kind of labels; it has a student
for each student seed. N: training images, C: classes, IPC: images per class of an epoch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gdd_dist.config.settings import Config, Report
from gdd_dist.config.steps import ROWS_VERSION
from gdd_dist.data.order import Order, default_streams
from gdd_dist.evaluation.confusion import StudentResult
from gdd_dist.evaluation.kinds import BASELINES, GENERATORS
from gdd_dist.models.classifiers import parse_student
from gdd_dist.storage.json_files import fingerprint
from sharding.errors import UserError
from sharding.manifest import Manifest


@dataclass(frozen=True)
class Row:
    """A row of the table. ``protocol`` and ``ipc`` are None if all real training data is used (``train_on`` full).

    A row that is not ``augmented`` is in no table, and is only used for DD-Ranking's ARS. ``select``: for each image, the student
    sees the one of so many draws with the highest teacher probability of its class; 1: no choice. ``condense``: steps in which the
    teachers move the latents of a fixed set; 0: none.
    """

    train_on: str
    student: str
    protocol: str | None
    labels: str
    ipc: int | None
    augmented: bool = True
    select: int = 1
    condense: int = 0

    @property
    def reads(self) -> tuple[str, ...]:
        """The steps whose output the row reads, besides the data."""
        soft = ("teachers",) if self.labels == "soft" or self.select > 1 or self.condense else ()
        step = "matching" if self.train_on == "equal_bytes" else GENERATORS.get(self.train_on)
        return soft + ((step,) if step else ())


@dataclass(frozen=True)
class Budget:
    """The budget of training one student. ``batch``: images per step; the last step of an epoch may have fewer.

    ``distinct_images_seen`` is an upper bound for a full row, whose order leaves out a few different images in each epoch, and for
    chosen real images.
    """

    epochs: int
    optimizer_steps: int
    batch: int
    images_seen: int
    distinct_images_seen: int


@dataclass(frozen=True)
class Job:
    """One student: row × student seed, with the fingerprint of everything that determines its accuracy."""

    row: Row
    seed: int
    budget: Budget
    fingerprint: str


def plan(config: Config) -> list[Row]:
    """Return all rows, in the order of the table."""
    r = config.report
    kinds = [*(k for k in BASELINES if k in r.baselines and k != "full"), "matched"]
    rows = []
    for student in dict.fromkeys(r.students):
        if "full" in r.baselines:
            rows.append(Row("full", student, None, "hard", None))
        for ipc in dict.fromkeys(r.ipc):
            pairs = [(p, y) for p in dict.fromkeys(r.protocol) for y in dict.fromkeys(r.labels)]
            every = [
                Row(kind, student, p, y, ipc, select=n, condense=steps)
                for p, y in pairs
                for kind in kinds
                for n, steps in treatments(r, kind, p)
            ]
            rows += [r for r in every if (r.train_on, r.protocol) != ("equal_bytes", "fixed")]  # always fixed
    return rows + unaugmented(config, rows)


def treatments(report: Report, kind: str, protocol: str) -> list[tuple[int, int]]:
    """Return (draws to choose from, steps of condensation) of each row of a kind, in the order of the table.

    A fixed set of real images is not drawn, so there is no choice. Only generated images have latents to move.
    """
    if kind == "equal_bytes":
        return [(1, 0)]
    moved = [(1, report.condense)] if report.condense and protocol == "fixed" and kind in GENERATORS else []
    return [(n, 0) for n in dict.fromkeys(report.select)] + moved


def unaugmented(config: Config, rows: Sequence[Row]) -> list[Row]:
    """Return the fixed rows of real and matched without augmentation, if the ARS is requested and defined."""
    loader = config.loader
    if not config.report.ars or "real" not in config.report.baselines or (loader.augment == "none" and not loader.flip):
        return []
    return [
        replace(r, augmented=False)
        for r in rows
        if r.protocol == "fixed" and r.train_on in ("real", "matched") and r.select == 1 and not r.condense
    ]


def full_order(config: Config, shard_samples: Sequence[int], seed: int) -> Order:
    """Return the order in which a full-data student sees train."""
    batch = min(config.report.batch, sum(shard_samples))
    purpose = f"report/full/{seed}"
    streams = default_streams(batch)
    return Order(tuple(shard_samples), batch, streams, config.step_seed("report"), purpose, config.loader.window)


def budget(config: Config, manifest: Manifest, row: Row) -> Budget:
    """Return the budget of each of a row's students."""
    r, train = config.report, manifest.splits["train"]
    if row.ipc is None:
        order = full_order(config, [s.samples for s in train.shards], 0)
        steps = r.full_epochs * order.steps_per_epoch
        seen = steps * order.batch_size
        return Budget(r.full_epochs, steps, order.batch_size, seen, min(seen, train.samples))
    images = row.ipc * len(manifest.classes)
    batch = min(r.batch, images)
    draws = r.epochs if row.protocol == "regenerate" else 1
    distinct = draws * images
    if row.train_on in ("real", "equal_bytes"):
        distinct = sum(min(n, draws * row.ipc) for n in train.class_counts)
    return Budget(r.epochs, r.epochs * -(-images // batch), batch, r.epochs * images, distinct)


def step_bounds(images: int, batch: int, epochs: int) -> np.ndarray:
    """Return the bounds of steps in the sequence of all images a student sees, int64 [steps + 1]; an epoch's last batch may be small."""
    starts = np.arange(0, images, batch) + np.arange(epochs)[:, None] * images
    return np.append(starts.ravel(), epochs * images)


def shaping(config: Config, row: Row, spent: Budget) -> dict[str, Any]:
    """Return the settings that determine a row's results."""
    r, loader = config.report, config.loader
    full = row.ipc is None
    augment, flip = (loader.augment, loader.flip) if row.augmented else ("none", False)
    names = ("train_on", "student", "protocol", "labels", "ipc", *(("select",) if row.select > 1 else ()))
    names += ("condense",) if row.condense else ()
    return {
        "row": {k: getattr(row, k) for k in names},
        "epochs": spent.epochs,
        "batch": spent.batch,
        "optimizer": {
            "lr": r.full_lr if full else r.lr,
            "momentum": r.momentum,
            "weight_decay": r.weight_decay,
        },
        "loader": {"augment": augment, "flip": flip, **({"window": loader.window} if full else {})},
        **({"label_temperature": r.label_temperature} if row.labels == "soft" else {}),
    }


def row_fingerprint(
    config: Config, row: Row, spent: Budget, seed: int, precision: str, fingerprints: Mapping[str, str]
) -> str:
    """Return the fingerprint of one student: settings, seeds, and what it reads. ``fingerprints``: of "data" and the steps."""
    return fingerprint(
        {
            "version": ROWS_VERSION,
            "settings": shaping(config, row, spent),
            "seed": config.step_seed("report"),
            "student_seed": seed,
            "precision": precision,
            "inputs": {name: fingerprints[name] for name in ("data", *row.reads)},
        }
    )


def jobs(config: Config, manifest: Manifest, precision: str, fingerprints: Mapping[str, str]) -> list[Job]:
    """Return all students of all rows, in the order of the table."""
    found = []
    for row in plan(config):
        spent = budget(config, manifest, row)
        for seed in range(config.report.seeds):
            fp = row_fingerprint(config, row, spent, seed, precision, fingerprints)
            found.append(Job(row, seed, spent, fp))
    return found


def result(row: Row, spent: Budget, seeds: Sequence[int], measured: Sequence[StudentResult]) -> dict[str, Any]:
    """Return a row of metrics.json, still without shares and scores. Accuracies in percent; std with ddof 1."""
    accuracies = [m.accuracy for m in measured]
    return {
        "train_on": row.train_on,
        "student": row.student,
        "protocol": row.protocol,
        "labels": row.labels,
        "ipc": row.ipc,
        "optimizer_steps": spent.optimizer_steps,
        "batch": spent.batch,
        "images_seen": spent.images_seen,
        "distinct_images_seen": round(sum(m.distinct for m in measured) / len(measured)),
        "mean": float(np.mean(accuracies)),
        "std": float(np.std(accuracies, ddof=1)) if len(accuracies) > 1 else None,
        "seeds": list(seeds),
        "accuracies": list(accuracies),
        "ceiling_share": None,
        "balanced_mean": float(np.mean([m.balanced for m in measured])),
        "lrs": None,
        "ars": None,
        **({} if row.augmented else {"augmented": False}),
        **({} if row.select == 1 else {"select": row.select}),
        **({"condense": row.condense} if row.condense else {}),
    }


def with_ceiling_shares(results: Sequence[Mapping[str, Any]], classes: int) -> list[dict[str, Any]]:
    """Fill in ceiling_share = (mean - 100/C) / (ceiling - 100/C): a row's position between chance and ceiling.

    The ceiling is the hard ``real`` ``regenerate`` row of the same student and IPC; None if it is missing or at chance.
    """
    chance = 100.0 / classes
    ceilings = {
        (r["student"], r["ipc"]): r["mean"]
        for r in results
        if (r["train_on"], r["protocol"], r["labels"]) == ("real", "regenerate", "hard") and "select" not in r
    }

    def share(r: Mapping[str, Any]) -> float | None:
        ceiling = ceilings.get((r["student"], r["ipc"]))
        return (r["mean"] - chance) / (ceiling - chance) if ceiling is not None and ceiling > chance else None

    return [{**r, "ceiling_share": share(r)} for r in results]


def check(config: Config, manifest: Manifest) -> None:
    """Raise UserError if the report's settings do not fit the data set; called before the first step runs."""
    for name in config.report.students:
        parse_student(name)
    if {"real", "equal_bytes"} & set(config.report.baselines):
        _check_class_sizes(config, manifest)


def _check_class_sizes(config: Config, manifest: Manifest) -> None:
    """Raise UserError if a class has too few images: a fixed real set needs IPC of them, a new set per epoch at least one."""
    counts = manifest.splits["train"].class_counts
    c = int(np.argmin(counts))
    have, name = counts[c], manifest.classes[c]
    if have == 0:
        raise UserError(f"class {name} has no training images; leave real and equal_bytes out of --report.baselines")
    ipc = max(config.report.ipc)
    if "fixed" in config.report.protocol and ipc > have:
        raise UserError(
            f"--report.ipc {ipc} is more than the {have} training images of class {name}; "
            "lower it, or leave fixed out of --report.protocol, or real out of --report.baselines"
        )
