"""Finished steps as the dry run needs them, made up: random weights, zero logits; and the files of a report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from gdd_dist.config.settings import STEPS
from gdd_dist.data.logit_cache import MEANS, logit_file
from gdd_dist.dry_run.sample_steps import adversaries, gan_step
from gdd_dist.evaluation.confusion import StudentResult
from gdd_dist.evaluation.ddranking import with_scores
from gdd_dist.evaluation.rows import jobs, with_ceiling_shares
from gdd_dist.evaluation.student_results import summarise
from gdd_dist.models.files import GENERATOR, TEACHERS, save_network
from gdd_dist.reporting import training_figures
from gdd_dist.reporting.diagnostics import collect
from gdd_dist.runtime.monitor import due
from gdd_dist.steps import report
from gdd_dist.storage.json_files import read_json, write_json
from gdd_dist.training.context import Context


class MadeUp:
    """Finished steps with random weights in ``directory``; logits are zeros that take no disk. Files have their true sizes."""

    def __init__(self, ctx: Context, directory: Path) -> None:
        self.teachers, self.logits, self.gan = (directory / name for name in ("teachers", "logits", "gan"))
        for path in (self.teachers, self.logits, self.gan):
            path.mkdir()
        self._write_teachers(ctx)
        self._write_logits(ctx)
        self._write_gan(ctx)

    def _write_teachers(self, ctx: Context) -> None:
        """One file an architecture, which all its teachers share."""
        t, records = ctx.config.teachers, []
        for name in t.architectures:
            meta = {"format": "gdd-classifier/1", "architecture": name, "data": ctx.manifest.fingerprint}
            save_network(self.teachers / f"{name}.safetensors", ctx.classifier(name, 0, "dry-run"), meta)
        for name in t.architectures * t.seeds:
            for last in (False,) * (t.snapshots - 1) + (True,):
                kept = {"seed": 0, "step": 10000, "snapshot": 0, "last": last, "val_accuracy": 61.25}
                records.append({"file": f"{name}.safetensors", "architecture": name, **kept})
        self.pool = len(records)
        write_json(self.teachers / TEACHERS, {"teachers": records})

    def _write_logits(self, ctx: Context) -> None:
        views, classes, create = ctx.config.logits.views, ctx.classes, np.lib.format.open_memmap
        for teacher in range(self.pool):
            for shard, n in enumerate(ctx.images("train").shards.shard_samples):
                path = logit_file(self.logits, teacher, shard)
                path.parent.mkdir(exist_ok=True)
                create(path, "w+", np.float16, (views, n, classes))
        create(self.logits / MEANS, "w+", np.float32, (self.pool, views, classes, classes))

    def _write_gan(self, ctx: Context) -> None:
        nets = adversaries(ctx)
        gan_step(ctx, nets)(ctx.config.accumulate)()
        save_network(self.gan / GENERATOR, nets.ema, {"format": "gdd-generator/1", "arch": nets.ema.arch})
        nets.save_discriminator(self.gan, write=True)
        nets.close()

    def dirs(self) -> dict[str, Path]:
        """What the report reads."""
        return {"teachers": self.teachers, "logits": self.logits, "gan": self.gan, "matching": self.gan}


def report_files(ctx: Context, made_up: MadeUp, fps: Mapping[str, str]) -> dict[str, int]:
    """Name → bytes of the files of a report whose figures are made up."""
    rng, m, snapshots = np.random.default_rng(0), ctx.config.matching, ctx.config.teachers.snapshots
    history = [
        {"step": s, "val": float(rng.uniform(60, 90)), "stderr": 1.25, "gap": float(rng.normal())}
        for s in (*range(0, m.steps, m.interval), m.steps)
    ]
    fps = {"data": fps["shards"], **fps}
    students = jobs(ctx.config, ctx.manifest, ctx.precision, fps)
    measured = {j.fingerprint: StudentResult(float(rng.uniform(60, 90)), 75.0, 12345) for j in students}
    results = with_scores(with_ceiling_shares(summarise(students, measured), ctx.classes))
    teachers = [
        {
            **t,
            "seed": i // snapshots,
            "step": 10 + i % snapshots,
            "val_accuracy": rng.normal(70 + 10 * (i % snapshots), 2),
        }
        for i, t in enumerate(read_json(made_up.teachers / TEACHERS)["teachers"])
    ]
    shown = {
        "samples.png": report.samples_figure(ctx, made_up.dirs()),
        "curves.png": training_figures.curves_figure(teachers, made_up_curves(ctx, rng), history, 0, results),
    }
    matrices = {j.row: rng.integers(0, 9, (ctx.classes, ctx.classes)) for j in students}
    evidence = collect(ctx, made_up.dirs(), matrices)
    cost = {"status": "computed", "seconds": 1234.5, "images_processed": 1234567, "ranks": ctx.world.size}
    costs = dict.fromkeys(STEPS, cost)
    files = report.documents(ctx, fps, history, results, evidence, shown, costs)
    return {name: len(content) for name, content in files.items()}


def made_up_curves(ctx: Context, rng: np.random.Generator) -> dict[str, training_figures.Curves]:
    """Losses of gan and matching, as noisy as they are on digits: a picture of them is as large."""
    noise, parts = 0.07, {"gan": ("loss_g", "loss_d"), "matching": ("loss", "pair", "mean", "adv")}
    curves: dict[str, training_figures.Curves] = {}
    for step, names in parts.items():
        total = getattr(ctx.config, step).steps
        logged = [s for s in range(total) if due(s, total)]
        curves[step] = {
            f"{step}/{n}": (logged, rng.normal(i, noise, len(logged)).tolist()) for i, n in enumerate(names)
        }
    return curves
