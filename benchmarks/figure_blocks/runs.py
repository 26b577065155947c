"""Figures of whole runs: accuracy of students by what they were trained on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from scipy.stats import ttest_1samp, ttest_ind

from figure_blocks.records import record, table

ROWS = {
    "real": "real images (regenerate: the ceiling)",
    "equal_bytes": "real images, equal bytes",
    "gaussian": "Gaussian per class",
    "gan": "GAN",
    "matched": "matched",
}
KEPT = {"gaussian": "the Gaussian per class", "refit": "the refitted Gaussian"}
COLUMNS = [(protocol, labels) for protocol in ("regenerate", "fixed") for labels in ("hard", "soft")]


def students(name: str) -> str:
    """Accuracy of students by what they were trained on, from a run's record; bold where matching beat the GAN beyond noise."""
    run = record(name)
    by = {(r["train_on"], r["protocol"], r["labels"]): r for r in run["metrics"]["results"] if "select" not in r}
    full, gap = by["full", None, "hard"], run["metrics"]["shortcut_gap"]

    def cell(what: str, protocol: str, labels: str) -> str:
        row = by.get((what, protocol, labels))
        if row is None:
            return "–"
        text = f"{row['mean']:.1f} ± {row['std']:.1f}"
        return f"**{text}**" if what == "matched" and beats(row, by["gan", protocol, labels]) else text

    rows = [
        [label, *(cell(what, *column) for column in COLUMNS)]
        for what, label in ROWS.items()
        if any(what == key[0] for key in by)
    ]
    one = by["real", "regenerate", "hard"]
    kept = KEPT.get(
        gap.get("selected", ""), f"step {gap['selected_step']}" if gap["selected_step"] else "the GAN itself (step 0)"
    )
    return (
        table(["trained on", *(f"{protocol}, {labels} labels" for protocol, labels in COLUMNS)], rows)
        + f"\n\nAccuracy on test in percent, mean ± standard deviation over {len(one['seeds'])} students. "
        f"IPC {one['ipc']}: {one['optimizer_steps']} steps of {one['batch']} images.\n"
        "Bold: better than the GAN beyond the noise of students (one run; Welch's t-test, p < 0.05).\n"
        f"All real data on its own budget: {full['mean']:.1f} ± {full['std']:.1f}. Matching kept {kept}. "
        f"Shortcut gap: {gap['gan']:.1f} points with the GAN, {gap['matched']:.1f} after matching.\n"
        f"Time, on {run['metrics']['hardware']['cpu']}: {run['note'].partition(';')[0]}.\n"
    )


def whole_runs(name: str) -> str:
    """Rows of several whole runs, and their paired differences, from the record of benchmarks/whole_runs.py."""
    run = record(name)
    first, count = run["rows"][0], len(run["seconds"])
    shown = [
        [
            titled(r["train_on"]),
            f"{r['bytes'] / 1e6:.2f}",
            f"{r['mean']:.1f} ± {r['std']:.1f}",
            ", ".join(f"{value:.1f}" for value in r["of_runs"]),
        ]
        for r in run["rows"]
    ]
    pairs = [
        [
            f"{one['row']} − {one['minus']}",
            ", ".join(f"{value:+.1f}" for value in one["of_runs"]),
            f"{one['mean']:+.2f} ± {one['stderr']:.2f}",
            proof(one),
        ]
        for one in run["differences"]
    ]
    gaps = ", ".join(
        f"{g.get('gan', g.get('gaussian')):.1f} and {g['matched']:.1f} ({KEPT.get(g['selected'], 'a step')})"
        for g in run["gaps"]
    )
    seconds = [sum(one.values()) / 60 for one in run["seconds"]]
    return (
        table(["trained on", "MB", "accuracy %", "of each run"], shown)
        + "\n\n"
        + table(
            ["difference in points", "of each run", "mean ± standard error over runs", "paired t-test over runs"], pairs
        )
        + f"\n\nAccuracy on test in percent, mean ± standard deviation over {first['students']} students of {count} whole runs. IPC "
        f"{first['ipc']}: {first['optimizer_steps']} steps of {first['batch']} images, {first['labels']} labels, {first['protocol']}.\n"
        f"Shortcut gap before matching and of what matching kept: {gaps}.\n"
        f"Time: {', '.join(f'{s:.0f}' for s in seconds)} minutes. {run['note']}\n"
    )


def refitted() -> str:
    """What the refitted Gaussian gained in runs of their own."""
    run = record("cifar10-refit.json")
    by = {r["train_on"]: r["mean"] for r in run["rows"]}
    gain = next(d for d in run["differences"] if (d["row"], d["minus"]) == ("matched", "gaussian"))
    moved, fitted = (
        next(r["of_runs"] for r in one["rows"] if r["train_on"] == "matched")
        for one in (record("cifar10-cpu.json"), run)
    )
    more = {"of_runs": [a - b for a, b in zip(moved, fitted, strict=True)]}
    return (
        f"Of {len(run['seconds'])} whole runs: Gaussian {by['gaussian']:.1f} %, refitted {by['matched']:.1f} %, the difference "
        f"{gain['mean']:+.2f} ± {gain['stderr']:.2f} points ({proof(gain)}, paired by run).\n"
        f"Moved minus refitted, on the same teachers: {', '.join(f'{d:+.1f}' for d in more['of_runs'])} points ({proof(more)}).\n"
    )


def natural_short() -> str:
    """CIFAR-10 in three sentences."""
    run = record("cifar10-cpu.json")
    by = {r["train_on"]: f"{r['mean']:.1f} %" for r in run["rows"]}
    fixed = record("cifar10-fixed.json")
    few = {r["train_on"]: f"{r['mean']:.1f} %" for r in fixed["rows"]}
    gain = next(d for d in run["differences"] if (d["row"], d["minus"]) == ("matched", "gaussian"))
    return (
        f"On CIFAR-10, with {len(run['seconds'])} whole runs on two cores, students reach {by['real']} on real images and {by['matched']} "
        f"on matched ones. They reach {by['gan']} on the GAN's and {by['gaussian']} on a Gaussian per class. "
        f"Matched minus Gaussian is {gain['mean']:+.1f} ± {gain['stderr']:.1f} points (standard error over runs).\n"
        f"One fixed set of {fixed['rows'][0]['ipc']} images per class: real {few['real']}, the best of 30 real ones {few['real, best of 30']}, "
        f"condensed {few['gaussian, condensed']}.\n"
    )


def titled(kind: str) -> str:
    """What a row trains on, as the tables call it: `matched, best of 3` among them."""
    name, comma, more = kind.partition(",")
    return ROWS[name] + comma + more


def proof(difference: dict[str, Any]) -> str:
    """What a paired t-test over runs says of a difference of row means."""
    test = ttest_1samp(difference["of_runs"], 0.0)
    return f"t = {test.statistic:.1f}, p = {test.pvalue:.3f}"


def beats(row: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether a row's students are better than another's, beyond their noise."""
    return row["mean"] > other["mean"] and bool(
        ttest_ind(row["accuracies"], other["accuracies"], equal_var=False).pvalue < 0.05
    )


FIGURES: dict[str, Callable[[], str]] = {
    "digits": lambda: students("digits.json"),
    "cifar10-cpu": lambda: whole_runs("cifar10-cpu.json"),
    "cifar10-refit": refitted,
    "cifar10-fixed": lambda: whole_runs("cifar10-fixed.json"),
    "natural-short": natural_short,
    "cifar10-trial": lambda: students("cifar10-trial.json"),
    "tiny-imagenet-cpu": lambda: whole_runs("tiny-imagenet-cpu.json"),
}
