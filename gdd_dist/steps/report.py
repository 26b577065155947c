"""Step: the report. Students are trained, and their results become a table, pictures and a page."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gdd_dist.config.settings import SECTIONS, Config
from gdd_dist.config.steps import Inputs
from gdd_dist.data.noise import permutation
from gdd_dist.evaluation.kinds import kind_of
from gdd_dist.evaluation.quick_students import INTERVAL, Candidates
from gdd_dist.evaluation.rows import jobs, plan
from gdd_dist.evaluation.student_results import cached, confusions, evaluate, log_accuracies
from gdd_dist.models.files import GENERATOR, TEACHERS, load_generator_network
from gdd_dist.models.generator import ImageGenerator
from gdd_dist.reporting import training_figures
from gdd_dist.reporting.accuracy_picture import PICTURE, picture
from gdd_dist.reporting.diagnostic_figures import gallery
from gdd_dist.reporting.diagnostics import NEIGHBOURS, Evidence, collect, summary
from gdd_dist.reporting.html_page import html
from gdd_dist.reporting.metrics import document
from gdd_dist.reporting.page import page
from gdd_dist.reporting.tables import table
from gdd_dist.reporting.verdict import first_screen
from gdd_dist.storage.json_files import ALONE, json_bytes, read_json, write_json
from gdd_dist.storage.store import CHECKPOINTS, CONTENTS, read_records
from gdd_dist.training.context import Context
from gdd_dist.training.drawing import draw
from sharding.files import write_atomic

__all__ = ["run", "table"]

SAMPLE_CLASSES, SAMPLE_COLUMNS = 20, 8
CHART_BYTES, TEXT_BYTES, ROW_BYTES = 400_000, 20_000, 1_000
"""Bytes of all charts, of the text in all formats, and of a row in it."""
SHOWN_SIDE, SHOWN_BYTES = 54, {1: 0.2, 3: 0.9}
"""Side in pixels to which an image is enlarged in a picture; bytes per enlarged pixel, by channels.

These values give the sizes of two reports within a tenth: on digits (16x16, 10 classes), and on 40 classes of smooth colour
noise (32x32).
"""


def run(ctx: Context, work: Path, inputs: Inputs) -> dict[str, Any]:
    """Measure all rows; write metrics.json, report.md, report.html and pictures into ``work``. Returns the headline numbers."""
    dirs, all_of = inputs.directories, inputs.fingerprints
    fingerprints = {"data": all_of["shards"], **{name: all_of[name] for name in dirs}}
    begin = time.monotonic()
    students = jobs(ctx.config, ctx.manifest, ctx.precision, fingerprints)
    _note_start(ctx, work, len(cached(ctx, students)))
    monitor = ctx.monitor("report", work, len(students), unit="student")
    results = evaluate(ctx, dirs, fingerprints, monitor)
    forwarded = ctx.world.sum(ctx.forwards)
    if ctx.world.is_main:
        candidates = Candidates.read(dirs["matching"])
        log_accuracies(monitor, results)
        samples = samples_figure(ctx, dirs)
        monitor.picture("samples", training_figures.pixels(samples), 0)
        evidence = collect(ctx, dirs, confusions(ctx, students))
        curves = curves_figure(ctx, dirs, fingerprints, candidates, results)
        own = {"status": status(ctx), "seconds": time.monotonic() - begin, "images_processed": forwarded}
        costs = {**earlier_costs(ctx, dirs), "report": {**own, "ranks": ctx.world.size}}
        shown = {"samples.png": samples, "curves.png": curves}
        for name, content in documents(ctx, fingerprints, candidates, results, evidence, shown, costs).items():
            write_atomic(work / name, content)
        monitor.hparams(flat_settings(ctx.config), kept_numbers(results))
    monitor.close()
    return kept_numbers(results)


def documents(
    ctx: Context,
    fingerprints: Mapping[str, str],
    candidates: Candidates,
    results: Sequence[Mapping[str, Any]],
    evidence: Evidence,
    shown: Mapping[str, training_figures.Figure],
    costs: Mapping[str, Mapping[str, Any]],
) -> dict[str, bytes]:
    """Return file name → content of all files of the report: metrics.json, the pictures, report.md, report.html."""
    metrics = document(ctx, fingerprints, candidates, results, {"nearest": summary(evidence.near)})
    pictures = {**shown, **gallery(evidence, ctx.class_names)}
    pngs = {name: training_figures.png(figure) for name, figure in pictures.items()}
    text = page(ctx, fingerprints, metrics, candidates, costs, evidence).encode("utf-8", "backslashreplace").decode()
    drawn = {**pngs, PICTURE: picture(first_screen(results), 100 / ctx.classes).encode()}
    return {
        "metrics.json": json_bytes(metrics),
        **drawn,
        "report.md": text.encode(),
        "report.html": html(text, drawn).encode(),
    }


def bytes_needed(ctx: Context) -> int:
    """Return the approximate bytes of ``documents``; the page contains the pictures a second time (base64)."""
    m, rows = ctx.manifest, len(plan(ctx.config))
    samples = 3 * min(ctx.classes, SAMPLE_CLASSES) * SAMPLE_COLUMNS
    images = samples + min(ctx.classes, 10) * (1 + NEIGHBOURS)
    pictures = CHART_BYTES + images * max(SHOWN_SIDE, m.height) ** 2 * SHOWN_BYTES[m.channels]
    return int(pictures * (1 + 4 / 3)) + TEXT_BYTES + ROW_BYTES * rows


def _note_start(ctx: Context, work: Path, known: int) -> None:
    """Note whether this continues a killed report: there are more finished students than when it began."""
    note = work / CHECKPOINTS / "start.json"
    if ctx.world.is_main:
        if note.exists():
            ctx.resumed = known > read_json(note, lambda found: int(found["students"]), ALONE)
        else:
            note.parent.mkdir(parents=True, exist_ok=True)
            write_json(note, {"students": known})


def headline_numbers(results: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Return the mean accuracy in percent of the first row of each kind, and the matched row's ceiling share."""
    first = {kind_of(r): r for r in reversed(results)}
    numbers: dict[str, float | None] = {kind: r["mean"] for kind, r in first.items()}
    return numbers | {"ceiling_share": first["matched"]["ceiling_share"]}


def kept_numbers(results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the headline numbers that were measured."""
    return {name: value for name, value in headline_numbers(results).items() if value is not None}


def flat_settings(config: Config) -> dict[str, Any]:
    """Return SECTION.NAME → value of every setting that changes results."""
    own = {"seed": config.seed, "precision": config.precision}
    return own | {f"{s}.{name}": v for s in SECTIONS for name, v in config.shaping(s).items()}


def status(ctx: Context) -> str:
    """Return the report's own status, as in steps.json."""
    return "resumed" if ctx.resumed else "computed"


def earlier_costs(ctx: Context, dirs: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """Return each earlier step's status in this run, as in steps.json, and its cost when it was computed."""
    costs = {}
    for name, record in read_records(ctx.out).items():
        if name == "report":
            continue
        contents = dirs[name] / CONTENTS if name in dirs else None
        known = read_json(contents, _cost) if contents is not None and contents.exists() else record
        costs[name] = {"status": record["status"]} | {k: known.get(k) for k in ("seconds", "images_processed", "ranks")}
    return costs


def _cost(contents: Any) -> dict[str, Any]:
    return dict(contents.get("cost", {}))


def samples_figure(ctx: Context, dirs: Mapping[str, Path]) -> training_figures.Figure:
    """Show real images, the GAN's and the matched generator's, a row for each class; generators get the same latents."""
    count = min(ctx.classes, SAMPLE_CLASSES)
    classes = np.arange(count) * ctx.classes // count
    generators = {
        "GAN": load_generator_network(dirs["gan"] / GENERATOR)[0],
        "matched": load_generator_network(dirs["matching"] / GENERATOR)[0],
    }
    panels = {"real (train)": _real_samples(ctx, classes)}
    panels |= {title: _drawn_samples(ctx, net, classes) for title, net in generators.items()}
    return training_figures.samples_figure(panels, [ctx.class_names[c] for c in classes])


def _real_samples(ctx: Context, classes: np.ndarray) -> np.ndarray:
    """Return uint8 [classes, columns, H, W, C] from train; white if a class has too few images."""
    images, seed = ctx.images("train"), ctx.config.step_seed("report")
    m = ctx.manifest
    out = np.full((len(classes), SAMPLE_COLUMNS, m.height, m.width, m.channels), 255, dtype=np.uint8)
    for row, c in zip(out, classes.tolist(), strict=True):
        members = np.flatnonzero(images.labels == c)
        chosen = members[permutation(seed, "report/samples", c, len(members))[:SAMPLE_COLUMNS]]
        row[: len(chosen)] = images.read(chosen).cpu().permute(0, 2, 3, 1).numpy()
    return out


def _drawn_samples(ctx: Context, generator: ImageGenerator, classes: np.ndarray) -> np.ndarray:
    labels = np.repeat(classes, SAMPLE_COLUMNS)
    net = ctx.watch(generator).eval()
    images = draw(ctx, net, labels, ctx.config.step_seed("report"), "report/samples", 0).cpu().permute(0, 2, 3, 1)
    return images.numpy().reshape(len(classes), SAMPLE_COLUMNS, *images.shape[1:])


def curves_figure(
    ctx: Context,
    dirs: Mapping[str, Path],
    fingerprints: Mapping[str, str],
    candidates: Candidates,
    results: Sequence[Mapping[str, Any]],
) -> training_figures.Figure:
    """Return the figure of curves, from the list of teachers, this run's event files and matching's candidates."""
    logs = ctx.out / "tensorboard"
    curves = {step: training_figures.read_curves(logs / step / fingerprints[step][:8]) for step in ("gan", "matching")}
    kept = candidates.kept(ctx.config.matching.select)
    step = kept[1]["step"] if kept and kept[0] == INTERVAL else None
    teachers = read_json(dirs["teachers"] / TEACHERS, lambda document: document["teachers"])
    return training_figures.curves_figure(teachers, curves, candidates.history, step, results)
