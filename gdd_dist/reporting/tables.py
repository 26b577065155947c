"""The table of rows, as plain text and as Markdown, and its summary in one sentence."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from gdd_dist.evaluation.kinds import kind_of

NONE = "–"
BALANCED_TOLERANCE = 1e-6


def accuracy(mean: float, std: float | None) -> str:
    """Return mean ± standard deviation, in percent."""
    return f"{mean:.1f}" if std is None else f"{mean:.1f} ± {std:.1f}"


CELLS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "train on": kind_of,
    "student": lambda r: r["student"],
    "protocol": lambda r: r["protocol"] or NONE,
    "labels": lambda r: r["labels"],
    "IPC": lambda r: number(r["ipc"], "d"),
    "steps": lambda r: number(r["optimizer_steps"], ",d"),
    "batch": lambda r: number(r["batch"], ",d"),
    "images seen": lambda r: number(r["images_seen"], ",d"),
    "distinct": lambda r: number(r["distinct_images_seen"], ",d"),
    "MB": lambda r: number(None if r.get("bytes") is None else r["bytes"] / 1e6, ".2f"),
    "accuracy %": lambda r: accuracy(r["mean"], r["std"]),
    "ceiling share": lambda r: number(r["ceiling_share"], ".0%").replace("%", " %"),
    "balanced %": lambda r: number(r.get("balanced_mean"), ".1f"),
    "LRS": lambda r: number(r.get("lrs"), ".3f"),
    "ARS": lambda r: number(r.get("ars"), ".3f"),
}
"""Name of a column → function of a row that gives its text."""
WORDS = ("train on", "student", "protocol", "labels")
"""Columns aligned to the left; the others contain numbers."""
BUDGET = ("steps", "batch", "images seen", "distinct", "MB")
RESULT = ("accuracy %", "ceiling share")
SCORES = ("balanced %", "LRS", "ARS")
"""Columns only in Markdown, if a row has values for them."""
ON_TERMINAL = (*WORDS, "IPC", *BUDGET, *RESULT)
IN_MARKDOWN = (*WORDS, "IPC", *RESULT, *SCORES, *BUDGET)
"""Accuracies come first, so that a narrow screen shows them."""


def number(value: float | None, form: str) -> str:
    """Return a formatted number, or NONE."""
    return NONE if value is None else format(value, form)


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows as plain text for a terminal; blank lines separate budgets."""
    header, rule, *body = ruled(ON_TERMINAL, [[CELLS[c](r) for c in ON_TERMINAL] for r in results], len(WORDS))
    out, last = [header, rule], None
    for r, line in zip(results, body, strict=True):
        group = tuple(r[k] for k in ("student", "protocol", "labels", "ipc"))
        out += ([""] if last not in (None, group) else []) + [line]
        last = group
    return "\n".join(out)


def ruled(header: Sequence[str], lines: Sequence[Sequence[str]], left: int) -> list[str]:
    """Return ``aligned`` lines below a header and a rule."""
    rule = ["-" * width for width in _widths([header, *lines])]
    return aligned([header, rule, *lines], left)


def aligned(lines: Sequence[Sequence[str]], left: int) -> list[str]:
    """Return lines of plain text in columns; the first ``left`` columns are aligned to the left, others to the right."""
    widths = _widths(lines)

    def one(line: Sequence[str]) -> str:
        pairs = enumerate(zip(line, widths, strict=True))
        return "  ".join(c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in pairs).rstrip()

    return [one(line) for line in lines]


def _widths(lines: Sequence[Sequence[str]]) -> list[int]:
    return [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]], left: int = 1) -> str:
    """Return a Markdown table; the first ``left`` columns are aligned to the left, the others to the right.

    HTML and vertical bars in cells are escaped.
    """
    rule = ["---" if i < left else "---:" for i in range(len(header))]
    escaped = [[c.replace("<", "&lt;").replace("|", "\\|") for c in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in (list(header), rule, *escaped))


def markdown_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows as Markdown, without columns that these rows do not need."""
    unused = {name for name in SCORES if all(CELLS[name](r) == NONE for r in results)}
    if not any(differs(r) for r in results):
        unused.add("balanced %")
    order = [name for name in IN_MARKDOWN if name not in unused]
    return markdown(order, [[CELLS[name](r) for name in order] for r in results], len(WORDS))


def differs(r: Mapping[str, Any]) -> bool:
    """Whether balanced accuracy differs from accuracy, because the classes of test have different sizes."""
    balanced = r.get("balanced_mean")
    return balanced is not None and abs(balanced - r["mean"]) > BALANCED_TOLERANCE


def headline(results: Sequence[Mapping[str, Any]]) -> str:
    """Return one or two sentences about the first matched row and the rows to compare it with."""
    first = next((r for r in results if r["train_on"] == "matched"), None)
    if first is None:
        return "No student was trained on the matched generator."
    group = ("student", "protocol", "labels", "ipc")
    near = {kind_of(r): r for r in results if all(r[k] == first[k] for k in group)}
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
