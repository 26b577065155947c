"""Trains every student of the report once: stored results, work shared between ranks, rows.

STORE/report/rows/<fingerprint>.json holds one student's result, so a killed report continues with the missing students, and
rows with unchanged inputs are never trained again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gdd_dist.evaluation.confusion import StudentResult, pack, unpack
from gdd_dist.evaluation.ddranking import with_scores
from gdd_dist.evaluation.job_images import images_answered, images_condensed
from gdd_dist.evaluation.kinds import GENERATORS, kind_of
from gdd_dist.evaluation.quick_students import INTERVAL, Candidates
from gdd_dist.evaluation.rows import Job, Row, jobs, result, row_fingerprint, with_ceiling_shares
from gdd_dist.evaluation.students import Frozen, train
from gdd_dist.models.classifiers import classifier_weights
from gdd_dist.models.files import GENERATOR, read_teachers
from gdd_dist.runtime.locks import Lock, holding
from gdd_dist.runtime.monitor import Monitor, say
from gdd_dist.storage.json_files import ALONE, fingerprint, read_json, write_json
from gdd_dist.training.context import Context
from sharding.errors import UserError


def record_path(ctx: Context, job: Job) -> Path:
    """Return the path of one student's result: STORE/report/rows/<fingerprint>.json."""
    return ctx.store.root / "report" / "rows" / f"{job.fingerprint}.json"


def save_record(path: Path, job: Job, measured: StudentResult, matrix: np.ndarray) -> None:
    """Write one student's result and its confusion matrix atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    body = {
        "format": "gdd-row/1",
        "fingerprint": job.fingerprint,
        "train_on": job.row.train_on,
        "student": job.row.student,
        "protocol": job.row.protocol,
        "labels": job.row.labels,
        "ipc": job.row.ipc,
        "seed": job.seed,
        "augmented": job.row.augmented,
        "select": job.row.select,
        "condense": job.row.condense,
        "accuracy": measured.accuracy,
        "balanced_accuracy": measured.balanced,
        "distinct_images_seen": measured.distinct,
        "confusion": pack(matrix),
    }
    write_json(path, {**body, "check": fingerprint(body)})


def load_record(path: Path, job: Job) -> StudentResult | None:
    """Return one student's result, or None if there is none; a damaged file is reported and counts as missing."""
    if not path.exists():
        return None
    try:
        body = read_json(path)
        whole = body.pop("check") == fingerprint(body) and body["fingerprint"] == job.fingerprint
        if whole:
            return StudentResult(
                float(body["accuracy"]), float(body["balanced_accuracy"]), int(body["distinct_images_seen"])
            )
    except (UserError, AttributeError, KeyError, TypeError):
        pass
    say(f"report: {path} is damaged; this student is trained again")
    return None


def cached(ctx: Context, students: list[Job]) -> dict[str, StudentResult]:
    """Return the existing results, by fingerprint (rank 0 reads them, and sends them to all ranks)."""
    found = {j.fingerprint: load_record(record_path(ctx, j), j) for j in students} if ctx.world.is_main else {}
    told = ctx.world.broadcast({fp: m for fp, m in found.items() if m is not None})
    return {fp: StudentResult(*m) for fp, m in told.items()}


def confusions(ctx: Context, students: list[Job]) -> dict[Row, np.ndarray]:
    """Return the confusion matrices of finished students, summed over the students of each row: int64 [C, C]."""
    found: dict[Row, np.ndarray] = {}
    for job in students:
        found[job.row] = found.get(job.row, 0) + confusion_of(ctx, job)
    return found


def costs(ctx: Context, students: list[Job], teachers: Path | None) -> dict[str, float]:
    """Return each job's approximate cost by fingerprint, in images × weights, to start the expensive ones first."""

    weights = partial(classifier_weights, channels=ctx.manifest.channels, size=ctx.manifest.height, classes=ctx.classes)
    sizes = {name: weights(name) for name in {j.row.student for j in students}}
    pool = read_teachers(teachers) if teachers and any(map(images_answered, students)) else []
    forward_only = 1 / 3
    answer = forward_only * sum(weights(t.architecture) for t in pool if t.last)

    def cost(j: Job) -> float:
        return (
            j.budget.images_seen * sizes[j.row.student]
            + (images_answered(j) + images_condensed(j, ctx.manifest)) * answer
        )

    return {j.fingerprint: cost(j) for j in students}


def evaluate(
    ctx: Context, dirs: Mapping[str, Path], fingerprints: Mapping[str, str], monitor: Monitor
) -> list[dict[str, Any]]:
    """Train the students that no earlier run has trained; ranks share them; returns all rows. All ranks call it.

    ``dirs``: of the finished steps that rows read ("teachers", "gan", "matching"); ``fingerprints``: of these and of "data".
    """
    students = jobs(ctx.config, ctx.manifest, ctx.precision, fingerprints)
    known = cached(ctx, students)
    weights = costs(ctx, students, dirs.get("teachers"))
    todo = [j for j in students if j.fingerprint not in known]
    same = twins(ctx, todo, dirs, fingerprints)
    # Those with a twin come last, so that no rank waits for it.
    todo.sort(key=lambda j: (j.fingerprint in same, -weights[j.fingerprint]))
    frozen, mine = Frozen(ctx, dirs), {}
    rows, records = record_path(ctx, students[0]).parent, [f"{j.fingerprint}.json" for j in students]
    monitor.already(len(known))
    for n in ctx.world.queue(len(todo)):
        mine[todo[n].fingerprint] = train_once(ctx, frozen, todo[n], same.get(todo[n].fingerprint))
        if ctx.world.is_main:
            done = sum(record_path(ctx, j).exists() for j in todo)
            monitor.advance(len(known) + done, f"{todo[n].row.train_on} {todo[n].row.student} {todo[n].row.labels}")
    for part in ctx.world.gather(mine):
        known |= {fp: StudentResult(*m) for fp, m in part.items()}
    ctx.disks.share(rows, records)
    monitor.advance(len(students))
    rows_found = with_bytes(ctx, dirs, summarise(students, known))
    return with_scores(with_ceiling_shares(rows_found, ctx.classes))


def with_bytes(ctx: Context, dirs: Mapping[str, Path], results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Fill in ``bytes``: the size of everything needed to train such a student: a generator's file, or stored real images; and
    the teachers, if they label or choose.
    """
    shards = ctx.images("train").shards
    mean = shards.payload_bytes / shards.samples

    def asks(r: Mapping[str, Any]) -> bool:
        return r["labels"] == "soft" or "select" in r or "condense" in r

    pool = read_teachers(dirs["teachers"]) if any(map(asks, results)) else []
    teachers = sum(t.path.stat().st_size for t in pool if t.last)

    def size(r: Mapping[str, Any]) -> int:
        beside = teachers if asks(r) else 0
        if r["train_on"] in GENERATORS:
            return beside + (dirs[GENERATORS[r["train_on"]]] / GENERATOR).stat().st_size
        return beside + round(mean * min(r["distinct_images_seen"] * r.get("select", 1), shards.samples))

    return [{**r, "bytes": size(r)} for r in results]


def twins(
    ctx: Context, students: list[Job], dirs: Mapping[str, Path], fingerprints: Mapping[str, str]
) -> dict[str, Job]:
    """Return, by fingerprint, the equal student on the generator of an earlier step, if matching kept that generator unchanged.

    No random number depends on what a row trains on, so both students have the same result.
    """
    matched = [j for j in students if j.row.train_on == "matched"]
    kind = kept_unchanged(ctx, dirs["matching"]) if matched else None
    if kind is None or kind not in dirs:
        return {}
    found = {}
    for j in matched:
        row = replace(j.row, train_on=kind)
        own = row_fingerprint(ctx.config, row, j.budget, j.seed, ctx.precision, fingerprints)
        found[j.fingerprint] = replace(j, row=row, fingerprint=own)
    return found


def kept_unchanged(ctx: Context, matching: Path) -> str | None:
    """Return the step whose generator matching kept as it was: gan or gaussian; None if it kept one that it trained."""
    m = ctx.config.matching
    kept = Candidates.read(matching).kept(m.select)
    if kept is None:
        return None
    name, measured = kept
    if name != INTERVAL:
        return name
    # The Gaussian that matching moves is another network, so even before the first step it is the same only up to rounding.
    return "gan" if measured["step"] == 0 and m.start == "gan" else None


def train_once(ctx: Context, frozen: Frozen, job: Job, twin: Job | None = None) -> StudentResult:
    """Train one student and store its result, or take that of its ``twin``; if another run on this store is training it, wait and
    use that result.
    """
    path = record_path(ctx, job)

    def busy(_holder: Mapping[str, Any]) -> None:
        ctx.world.check_stop()

    with holding(Lock(path.with_suffix(".lock")), busy):
        measured = load_record(path, job)
        if measured is None:
            if twin is None:
                measured, matrix = train(ctx, frozen, job)
            else:
                measured, matrix = train_once(ctx, frozen, twin), confusion_of(ctx, twin)
            save_record(path, job, measured, matrix)
    return measured


def confusion_of(ctx: Context, job: Job) -> np.ndarray:
    """Return the confusion matrix of a finished student: int64 [C, C]."""
    matrix: np.ndarray = read_json(record_path(ctx, job), lambda body: unpack(body["confusion"]), ALONE)
    return matrix


def summarise(students: list[Job], measured: Mapping[str, StudentResult]) -> list[dict[str, Any]]:
    """Return one result per row, in the order of the table."""
    by_row: dict[Row, list[Job]] = {}
    for job in students:
        by_row.setdefault(job.row, []).append(job)
    results = []
    for row, members in by_row.items():
        values = [measured[j.fingerprint] for j in members]
        results.append(result(row, members[0].budget, [j.seed for j in members], values))
    return results


def log_accuracies(monitor: Monitor, results: list[dict[str, Any]]) -> None:
    """Log each row's mean accuracy to TensorBoard, over IPC if the row has one."""
    for r in results:
        name = "/".join(("accuracy", r["student"], kind_of(r), r["protocol"] or "all", r["labels"]))
        monitor.scalars(r["ipc"] or 0, {name: r["mean"]})
