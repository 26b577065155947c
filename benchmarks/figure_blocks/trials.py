"""Figures of single questions: the trivial generator, standardization, the search; and what the presets' students see."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable
from typing import Any

from scipy.stats import ttest_rel

from figure_blocks import records
from figure_blocks.records import lines, only, table
from gdd_dist.config.presets import PRESETS
from gdd_dist.config.settings import Report


def trivial() -> str:
    """What students learn from the trivial generator, real images and what teachers choose, on test."""
    rows = []
    for one in (d for d in gaussians() if "test" in d):
        settings, size, of = one["settings"], one["bytes"], one["test"]["of_students"]
        what = {
            "real": "real images, drawn anew",
            "gaussian": f"a Gaussian a class, {settings.get('components')} components, spread {settings.get('spread')}",
            "equal_bytes": f"real images, {settings.get('images_a_class', ['?'])[0]} a class",
            "best": f"the Gaussian of spread {settings.get('spread')}, of {settings.get('of')} draws the one that teachers choose",
            "refit": f"a Gaussian fitted to the best of {settings.get('of')} draws of it",
        }[one["row"]]
        kept = "–" if size is None else f"{size / 1e6:.2f}"
        rows.append(
            [
                one["data"].partition("-")[0],
                what,
                kept,
                f"{one['test']['mean']:.1f} ± {one['test']['std']:.1f}",
                str(len(of)),
            ]
        )
    return table(["data", "trained on", "MB", "accuracy %", "students"], rows) + "\n"


def gaussians() -> list[dict[str, Any]]:
    """The lines of the trivial generator, in the order in which they were measured."""
    return [json.loads(text) for text in (records.RESULTS / "gaussian.jsonl").read_text().splitlines()]


def terms() -> str:
    """What each set of terms makes of the Gaussians."""
    return moved_rows("terms.jsonl", "gaussian")


def adversaries() -> str:
    """What an adversary adds to the terms that move the Gaussians, at equal CPU seconds."""
    return moved_rows("adversaries.jsonl", "none")


def moved_rows(record: str, beside: str) -> str:
    """Students' accuracies of each row of ``record``, means over runs, and their differences from the row ``beside``, paired by run."""
    found = [json.loads(text) for text in (records.RESULTS / record).read_text().splitlines()]
    budgets, names = (list(dict.fromkeys(one[key] for one in found)) for key in ("budget", "row"))
    reached = {(one["row"], one["budget"], one["run"]): one["test"]["mean"] for one in found}
    steps = {
        name: [one["settings"]["steps"] for one in found if one["row"] == name and "steps" in one["settings"]]
        for name in names
    }
    runs = list(dict.fromkeys(one["run"] for one in found))
    rows = []
    for name in names:
        cells = []
        for budget in budgets:
            own, other = ([reached[row, budget, run] for run in runs] for row in (name, beside))
            cells.append(f"{statistics.mean(own):.1f}")
            each = ", ".join(f"{a - b:+.1f}" for a, b in zip(own, other, strict=True))
            cells.append("–" if name == beside else f"{each} (p = {ttest_rel(own, other).pvalue:.3f})")
        rows.append([f"{name} ({statistics.mean(steps[name]):.0f} steps)" if steps[name] else name, *cells])
    head = [text for budget in budgets for text in (f"{budget}: accuracy %", f"minus {beside}, of each run")]
    students = len(found[0]["test"]["of_students"])
    return table(["trained on", *head], rows) + (
        f"\nBudgets are steps × images of a student; {students} students a row and run, {len(runs)} runs; p: paired t-test over runs.\n"
    )


def protocols() -> str:
    """What a student of each preset for GPUs sees, by IPC: arithmetic on the settings, nothing measured."""
    rows = []
    for preset, classes in (("cifar10", 10), ("cifar100", 100), ("tiny-imagenet", 200)):
        report = {field.name: field.default for field in dataclasses.fields(Report)}
        report |= {name.removeprefix("report."): value for name, value in PRESETS[preset].items()}
        for ipc in (1, 10, 50):
            images, epochs = ipc * classes, report["epochs"]
            batch = min(report["batch"], images)
            steps = epochs * -(-images // batch)
            rows.append(
                [preset, str(ipc), f"{epochs:,}", f"{steps:,}", f"{batch}", f"{epochs * images:,}", f"{images:,}"]
            )
    head = [
        "preset",
        "IPC",
        "epochs",
        "steps",
        "images a step",
        "images seen (regenerate: all distinct)",
        "distinct in `fixed`",
    ]
    return table(head, rows) + "\n"


def standardization() -> str:
    text = []
    for labels in ("hard", "soft"):
        (one,) = (o for o in lines("standardization.jsonl") if o["unit"].endswith(f"{labels} labels"))
        test = ttest_rel(one["settings"]["skd"], one["settings"]["kd"])
        text.append(
            f"- {labels} labels: {one['ours']:.1f} % standardized, {one['other']['kd']:.1f} % not. The difference is "
            f"{one['difference']:.2f} ± {one['stderr']:.2f} points (standard error over {one['settings']['seeds']} runs): "
            f"{'proved' if test.pvalue < 0.05 else 'no proof'} (t = {test.statistic:.1f}, {test.df} degrees of freedom)."
        )
    return "\n".join(text) + "\n"


def search_outcome() -> str:
    return (
        next(t for t in (records.RESULTS / "search-digits.md").read_text().splitlines() if t.startswith("Best on val"))
        + "\n"
    )


def search_cost() -> str:
    over, reuse = only("search.jsonl", "search-overhead"), only("search.jsonl", "search-reuse")
    trials = over["settings"]["trials"]
    return (
        f"On two idle cores, one round: {trials} trials of {over['ours'] / trials:.0f} s took "
        f"{100 / over['ratio'] - 100:.1f} % longer through the search than by hand.\n"
        f"A trial that computes teachers, logits and GAN for itself takes {reuse['ratio']:.1f} times as long.\n"
    )


FIGURES: dict[str, Callable[[], str]] = {
    "terms": terms,
    "adversaries": adversaries,
    "protocols": protocols,
    "trivial": trivial,
    "standardization": standardization,
    "search-outcome": search_outcome,
    "search-cost": search_cost,
}
