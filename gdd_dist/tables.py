"""The table of rows, as plain text and as Markdown, and the sentence that sums it up."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

COLUMNS = (
    "train on",
    "student",
    "protocol",
    "labels",
    "IPC",
    "steps",
    "batch",
    "images seen",
    "distinct",
    "accuracy %",
    "ceiling share",
)
LEFT = 4
"""Columns of words, aligned to the left; the others hold numbers."""
NONE = "–"
BALANCED_TOLERANCE = 1e-6


def accuracy(mean: float, std: float | None) -> str:
    """Mean ± standard deviation, in percent."""
    return f"{mean:.1f}" if std is None else f"{mean:.1f} ± {std:.1f}"


def cells(r: Mapping[str, Any]) -> list[str]:
    """A row's cells."""
    share = r["ceiling_share"]
    return [
        r["train_on"],
        r["student"],
        r["protocol"] or NONE,
        r["labels"],
        NONE if r["ipc"] is None else str(r["ipc"]),
        f"{r['optimizer_steps']:,}",
        f"{r['batch']:,}",
        f"{r['images_seen']:,}",
        f"{r['distinct_images_seen']:,}",
        accuracy(r["mean"], r["std"]),
        NONE if share is None else f"{100 * share:.0f} %",
    ]


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """The rows as plain text for a terminal; a blank line parts budgets."""
    lines = [list(COLUMNS), *(cells(r) for r in results)]
    rule = ["-" * width for width in _widths(lines)]
    header, rule_line, *body = aligned([lines[0], rule, *lines[1:]], LEFT)
    out, last = [header, rule_line], None
    for r, line in zip(results, body, strict=True):
        group = tuple(r[k] for k in ("student", "protocol", "labels", "ipc"))
        out += ([""] if last not in (None, group) else []) + [line]
        last = group
    return "\n".join(out)


def aligned(lines: Sequence[Sequence[str]], left: int) -> list[str]:
    """Lines of plain text whose cells stand below each other; the first ``left`` columns are aligned to the left."""
    widths = _widths(lines)

    def one(line: Sequence[str]) -> str:
        pairs = enumerate(zip(line, widths, strict=True))
        return "  ".join(c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in pairs).rstrip()

    return [one(line) for line in lines]


def _widths(lines: Sequence[Sequence[str]]) -> list[int]:
    return [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]], left: int = 1) -> str:
    """A Markdown table; the first ``left`` columns are aligned to the left, the others to the right.

    A name that holds HTML or a bar stays a name.
    """
    rule = ["---" if i < left else "---:" for i in range(len(header))]
    escaped = [[c.replace("<", "&lt;").replace("|", "\\|") for c in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in (list(header), rule, *escaped))


def markdown_table(results: Sequence[Mapping[str, Any]]) -> str:
    """The rows as Markdown, with the columns that these rows have a use for."""
    extras = {
        "balanced %": [r.get("balanced_mean") for r in results],
        "LRS": [r.get("lrs") for r in results],
        "ARS": [r.get("ars") for r in results],
    }
    if not any(differs(r) for r in results):
        del extras["balanced %"]
    chosen = {name: values for name, values in extras.items() if any(v is not None for v in values)}
    formats = {"balanced %": "{:.1f}"}
    more = [
        [
            NONE if values[i] is None else formats.get(name, "{:.3f}").format(values[i])
            for name, values in chosen.items()
        ]
        for i in range(len(results))
    ]
    return markdown((*COLUMNS, *chosen), [cells(r) + m for r, m in zip(results, more, strict=True)], LEFT)


def differs(r: Mapping[str, Any]) -> bool:
    """Whether classes of unequal size in test make balanced accuracy another figure."""
    balanced = r.get("balanced_mean")
    return balanced is not None and abs(balanced - r["mean"]) > BALANCED_TOLERANCE


def headline(results: Sequence[Mapping[str, Any]]) -> str:
    """One or two sentences about the first matched row and its neighbours."""
    first = next((r for r in results if r["train_on"] == "matched"), None)
    if first is None:
        return "No student was trained on the matched generator."
    group = ("student", "protocol", "labels", "ipc")
    near = {r["train_on"]: r for r in results if all(r[k] == first[k] for k in group)}
    share = first["ceiling_share"]
    text = (
        f"A {first['student']} trained for {first['optimizer_steps']:,} steps of at most {first['batch']} images, on nothing "
        f"but {first['ipc']} generated {'image' if first['ipc'] == 1 else 'images'} per class "
        f"({'drawn anew each epoch' if first['protocol'] == 'regenerate' else 'drawn once'}, {first['labels']} labels), "
        f"reaches **{accuracy(first['mean'], first['std'])} %** on the test set"
    )
    others = []
    if "gan" in near:
        others.append(f"{accuracy(near['gan']['mean'], near['gan']['std'])} % with the GAN before matching")
    if "real" in near:
        others.append(f"{accuracy(near['real']['mean'], near['real']['std'])} % with real images at the same budget")
    text += (", against " + " and ".join(others) if others else "") + "."
    return text + (f" That is {100 * share:.0f} % of the way from chance to the ceiling." if share is not None else "")
