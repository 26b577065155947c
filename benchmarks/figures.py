"""Every measured figure of README and docs, from the records in benchmarks/results.

    python benchmarks/figures.py            # write the marked blocks of all pages anew
    python benchmarks/figures.py --check    # name the blocks that differ from the records, and exit with 1

A page holds `<!-- figures: NAME -->`, the figures, and `<!-- end -->`. NAME is a function below; it reads records and returns Markdown.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scipy.stats import ttest_1samp, ttest_ind, ttest_rel

from gdd_dist.config.presets import PRESETS
from gdd_dist.config.settings import Report

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = [ROOT / "README.md", ROOT / "benchmarks/README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"<!-- figures: ([\w-]+) -->\n(.*?)<!-- end -->", re.DOTALL)
ROWS = {
    "real": "real images (regenerate: the ceiling)",
    "equal_bytes": "real images, equal bytes",
    "gaussian": "Gaussian per class",
    "gan": "GAN",
    "matched": "matched",
}
KEPT = {"gaussian": "the Gaussian per class", "refit": "the refitted Gaussian"}
COLUMNS = [(protocol, labels) for protocol in ("regenerate", "fixed") for labels in ("hard", "soft")]


def record(name: str) -> dict[str, Any]:
    """A record that is one JSON object."""
    found: dict[str, Any] = json.loads((RESULTS / name).read_text())
    return found


def lines(name: str, benchmark: str = "", **settings: Any) -> list[dict[str, Any]]:
    """The JSON lines of a record whose name begins with ``benchmark`` and whose settings are those given."""
    found = [json.loads(text) for text in (RESULTS / name).read_text().splitlines()]
    return [
        one for one in found if one["benchmark"].startswith(benchmark) and settings.items() <= one["settings"].items()
    ]


def only(name: str, benchmark: str, **settings: Any) -> dict[str, Any]:
    """The one line of a record that has exactly this name."""
    (found,) = (one for one in lines(name, benchmark, **settings) if one["benchmark"] == benchmark)
    return found


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


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
        f"{g['gan']:.1f} and {g['matched']:.1f} ({KEPT.get(g['selected'], 'a step')})" for g in run["gaps"]
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
        f"Shortcut gap of the GAN and of what matching kept: {gaps}.\n"
        f"Time: {', '.join(f'{s:.0f}' for s in seconds)} minutes. {run['note']}\n"
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
        next(t for t in (RESULTS / "search-digits.md").read_text().splitlines() if t.startswith("Best on val")) + "\n"
    )


def search_cost() -> str:
    over, reuse = only("search.jsonl", "search-overhead"), only("search.jsonl", "search-reuse")
    trials = over["settings"]["trials"]
    return (
        f"On two idle cores, one round: {trials} trials of {over['ours'] / trials:.0f} s took "
        f"{100 / over['ratio'] - 100:.1f} % longer through the search than by hand.\n"
        f"A trial that computes teachers, logits and GAN for itself takes {reuse['ratio']:.1f} times as long.\n"
    )


def loader() -> str:
    def ratio(benchmark: str) -> str:
        return f"{only('loader.json', benchmark)['ratio']:.1f} ×"

    one, others = only("loader.json", "loader/process"), only("loader.json", "loader/all")["other"]
    best = max(others, key=lambda name: others[name]).partition("/")[0].replace("ImageFolder", "ImageFolder with PIL")
    bare = [o["ratio"] for o in lines("loader.json", "loader/bare")]
    resident = {o["settings"]["ours"][-1]: o["ratio"] for o in lines("loader.json", "loader/resident")}
    mosaic = only("loader-mosaic.json", "loader/all")["other"]
    shorter = [
        o["ratio"]
        for n in ("loader-shorter.json", "loader-mosaic.json")
        for o in lines(n, "loader/all")
        if o["benchmark"] == "loader/all"
    ]
    rows = [
        [label, ratio(f"loader/process{name}"), ratio(f"loader/all{name}")]
        for label, name in (
            (f"{best} (the best of them)", ""),
            ("webdataset", ", webdataset"),
            ("webdataset that shuffles", ", shuffled webdataset"),
        )
    ]
    return (
        table(["images/s of ours over", "one process each", "the other at its best number of workers"], rows)
        + f"\n\n64-pixel JPEGs of Tiny ImageNet; ours is one process with two threads, {round(one['ours'], -3):,.0f} images/s. Two cores, "
        f"medians of {one['settings']['rounds']} rounds.\n"
        f"Other programs share the two cores, so the last column moves: {len(shorter)} shorter runs gave {min(shorter):.1f} to "
        f"{max(shorter):.1f} × ImageFolder.\n"
        f"Ours reaches {min(bare):.2f} of the bare decoder on the same bytes.\n"
        f"Kept decoded (`--loader.resident`): {resident['1']:.0f} × streaming with one thread, {resident['2']:.0f} × with two.\n"
        f"mosaicml-streaming, in another run: {mosaic['mosaicml-streaming/0']:,.0f} images/s in one process, "
        f"{mosaic['mosaicml-streaming/2']:,.0f} with two workers.\n"
    )  # fmt: skip


def waiting() -> str:
    rows = [
        [str(one["settings"]["ranks"]), one["settings"]["step"]]
        + [f"{100 * one['waiting'][how]:.1f} %" for how in ("stock webdataset", "streaming", "resident")]
        for one in lines("waiting.json")
    ]
    return (
        table(["ranks", "step", "stock webdataset", "ours", "ours, kept decoded"], rows)
        + "\n\nShare of a step's time spent waiting for data. One round, on made-up images, on two cores.\n"
    )


def order() -> str:
    seconds = {
        name: statistics.median(only("order.json", f"order/{name}")["seconds"]) for name in ("start-up", "resume")
    }
    return (
        f"The order of 10⁹ samples in 10⁶ shards starts in {seconds['start-up']:.2f} s, resumes in {seconds['resume']:.2f} s and takes "
        f"{only('order.json', 'order/memory')['megabytes']:.0f} MB, on two cores.\n"
    )


def hostile() -> str:
    found = lines("hostile.json")
    return f"{len(found)} hostile archives: each is refused; the worst takes {max(o['megabytes'] for o in found):.1f} MB of memory.\n"


def checkpoint() -> str:
    cost, kill = only("checkpoint.jsonl", "checkpoint cost"), only("checkpoint.jsonl", "after a kill")
    return (
        f"The GAN of the digits, {cost['settings']['ranks']} ranks on 2 cores beside other jobs, once: saving takes "
        f"{100 * cost['share']:.2f} % of the time.\nAfter a kill in the middle of an interval, {kill['seconds_of_work_repeated']:.0f} s of work "
        f"are repeated.\nThe first new step comes {kill['seconds_to_first_new_step']:.0f} s after the kill; most of that is the start of Python "
        "and torch.\n"
    )


def engines() -> str:
    rows = [
        [one["benchmark"].partition("/")[2].replace("zero_", "ZeRO "), f"{one['ratio']:.2f}",
         f"{min(one['ratios']):.2f} to {max(one['ratios']):.2f}"]
        for one in lines("engines.jsonl")
    ]  # fmt: skip
    one = lines("engines.jsonl")[0]["settings"]
    return (
        table(["engine", "images/s over DDP's, median", "range"], rows)
        + f"\n\n{one['ranks']} ranks on two idle cores, {one['rounds']} rounds; width {one['width']}, {one['size']} pixels, {one['batch']} "
        f"images a rank, {one['precision']}. A difference counts where the range does not hold 1.\n"
    )


def scaling() -> str:
    head = [
        "step",
        "ranks",
        "images/s",
        "step, s",
        "compute",
        "data",
        "communication",
        "bytes a step, formula",
        "counted",
    ]
    rows = []
    for one in lines("scaling.jsonl"):
        seconds, sent = one["seconds_a_step"], one["bytes_sent_a_step"]
        over = f" (+{100 * sent['counted'] / sent['formula'] - 100:.1f} %)" if sent["formula"] else ""
        rows.append(
            [one["benchmark"].partition("/")[2], str(one["settings"]["ranks"]), f"{one['ours']:.0f}"]
            + [f"{seconds[k]:.3f}" for k in ("step", "compute", "data", "communication")]
            + [f"{sent['formula']:,}", f"{sent['counted']:,}{over}"]
        )
    return table(head, rows) + "\n"


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
    return [json.loads(text) for text in (RESULTS / "gaussian.jsonl").read_text().splitlines()]


def startup() -> str:
    """How long commands take to answer, beside torch's import and an earlier version."""
    rows = [
        [
            one["settings"]["command"],
            f"{1 / one['over']['import torch']:.2f}",
            f"{1 / one['over']['e9ace49']:.2f}",
        ]
        for one in lines("startup.jsonl")
    ]
    head = ["command", "time, as a share of `import torch`", "as a share of the same at e9ace49"]
    return table(head, rows) + "\n\nMedians of 3 rounds on two busy cores.\n"


def student_steps() -> str:
    """Steps of the report's students beside an earlier version, by CPU time."""
    rows = [[one["benchmark"].partition("/")[2], f"{one['ratio']:.2f} ×"] for one in lines("students.jsonl")]
    return (
        table(["student", "steps a CPU second, over e9ace49 (last row: over one by one)"], rows)
        + "\n\nMedians of 3 rounds on two busy cores.\n"
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


FIGURES: dict[str, Callable[[], str]] = {
    "protocols": protocols,
    "digits": lambda: students("digits.json"),
    "cifar10-cpu": lambda: whole_runs("cifar10-cpu.json"),
    "cifar10-fixed": lambda: whole_runs("cifar10-fixed.json"),
    "natural-short": natural_short,
    "cifar10-trial": lambda: students("cifar10-trial.json"),
    "tiny-imagenet-trial": lambda: students("tiny-imagenet-trial.json"),
    "trivial": trivial,
    "startup": startup,
    "student-steps": student_steps,
    "standardization": standardization,
    "search-outcome": search_outcome,
    "search-cost": search_cost,
    "loader": loader,
    "waiting": waiting,
    "order": order,
    "hostile": hostile,
    "checkpoint": checkpoint,
    "engines": engines,
    "scaling": scaling,
}


def renewed(text: str) -> str:
    """A page with its blocks as the records have them."""
    return BLOCK.sub(lambda m: f"<!-- figures: {m[1]} -->\n{FIGURES[m[1]]()}<!-- end -->", text)


def differing(text: str) -> list[str]:
    """Names of a page's blocks that are not as the records have them."""
    return [name for name, body in BLOCK.findall(text) if body != FIGURES[name]()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; name the blocks that differ")
    check = parser.parse_args().check
    found = [(page, name) for page in PAGES for name in differing(page.read_text())]
    for page, name in found:
        print(f"{page.relative_to(ROOT)}: {name} {'differs from its record' if check else 'renewed'}")
        if not check:
            page.write_text(renewed(page.read_text()))
    return int(check and bool(found))


if __name__ == "__main__":
    sys.exit(main())
