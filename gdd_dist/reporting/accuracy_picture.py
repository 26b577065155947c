"""accuracy.svg: accuracy between chance, floor and ceiling, small enough for a telephone. It follows the reader's light or dark mode."""

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

from gdd_dist.reporting.tables import accuracy
from gdd_dist.reporting.training_figures import COLORS
from gdd_dist.reporting.verdict import CEILING, FLOOR, Result

PICTURE = "accuracy.svg"
WIDTH, LEFT, RIGHT, ROW, TOP = 420, 12, 12, 36, 8
STYLE = """
.acc { --ink: #1d2330; --faint: #d8dce2; --quiet: #6b7380; font: 13px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
@media screen and (prefers-color-scheme: dark) { .acc { --ink: #e3e7ee; --faint: #3a414d; --quiet: #9aa3b2; } }
.acc text, .acc circle { fill: var(--ink); } .acc .q { fill: var(--quiet); } .acc .b { font-weight: 700; }
.acc line { stroke: var(--faint); } .acc .s { stroke: var(--ink); } .acc .d { stroke: var(--quiet); stroke-dasharray: 3 2; }
""".strip()


def picture(shown: Mapping[str, Result], chance: float) -> str:
    """Return an SVG of rows by label: bars from chance (percent) to the mean, ± standard deviation, a dot for each student.

    Dashed lines mark floor and ceiling.
    """
    low = min(chance, *(min(r["accuracies"]) for r in shown.values()))
    high = min(100.0, 1.0 + max(max(*r["accuracies"], r["mean"] + (r["std"] or 0.0)) for r in shown.values()))
    bottom = TOP + ROW * len(shown)

    def x(value: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * (min(max(value, low), high) - low) / (high - low), 1)

    parts = [f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>']
    ends = [x(shown[end]["mean"]) for end in (FLOOR, CEILING) if end in shown]
    for i, (label, r) in enumerate(shown.items()):
        parts += _row(label, r, TOP + ROW * i, x, ends)
    axis = f'y="{bottom + 17}" class="q"'
    parts.append(f'<text x="{x(chance)}" {axis}>chance: {chance:.3g} %</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" {axis} text-anchor="end">accuracy on test, up to {high:.0f} %</text>')
    said = "; ".join(f"{label} {accuracy(r['mean'], r['std'])} %" for label, r in shown.items())
    return (
        f'<svg class="acc" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + 24}" role="img" '
        f'aria-label="{escape(said)}"><style>{STYLE}</style>{"".join(parts)}</svg>'
    )


def _row(label: str, r: Result, top: int, x: Callable[[float], float], ends: Sequence[float]) -> list[str]:
    """Return a row's label and accuracy, with its bar below, and dashed lines at ``ends``."""
    weight, color = (' class="b"' if r["train_on"] == "matched" else ""), COLORS[r["train_on"]]
    begin, end, y = x(-math.inf), x(r["mean"]), top + 24
    spread = [x(r["mean"] - r["std"]), x(r["mean"] + r["std"])] if r["std"] is not None else [end, end]
    return [
        f'<text x="{LEFT}" y="{top + 15}"{weight}>{escape(label)}</text>',
        f'<text x="{WIDTH - RIGHT}" y="{top + 15}"{weight} text-anchor="end">{accuracy(r["mean"], r["std"])} %</text>',
        f'<rect x="{begin}" y="{y - 4}" width="{end - begin:.1f}" height="8" rx="2" fill="{color}"/>',
        *(f'<line class="d" x1="{at}" x2="{at}" y1="{y - 7}" y2="{y + 9}"/>' for at in ends),
        f'<line class="s" x1="{spread[0]}" x2="{spread[1]}" y1="{y}" y2="{y}"/>',
        *(f'<circle cx="{x(a)}" cy="{y}" r="2.5"/>' for a in r["accuracies"]),
    ]
