"""The report's diagnostic pictures: accuracy by class, confusion matrices, teacher logits, nearest neighbours."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gdd_dist.evaluation.confusion import by_class
from gdd_dist.reporting.diagnostics import Answers, Evidence, Near, extremes
from gdd_dist.reporting.training_figures import COLORS, DPI, short, show_rows, without_top_and_right

KINDS = ("real", "gan", "matched")
WORDS = {"real": "real", "gan": "GAN", "matched": "matched"}
# If matching kept the GAN itself, both are equal, so the marks must not hide each other.
MARKS: dict[str, dict[str, Any]] = {
    "real": {"marker": "|", "s": 260, "zorder": 4, "linewidths": 2.2},
    "gan": {"marker": "o", "s": 130, "zorder": 2},
    "matched": {"marker": "o", "s": 45, "zorder": 3},
}
WIDTHS = {"real": 1.8, "gan": 4.0, "matched": 1.8}
MOST_CLASSES, MOST_NAMES = 24, 24


def gallery(evidence: Evidence, names: Sequence[str]) -> dict[str, Figure]:
    """Return file name → figure."""
    return {
        "classes.png": classes_figure(evidence.matrices, names),
        "confusion.png": confusion_figure(evidence.matrices, names),
        "answers.png": answers_figure(evidence.answers),
        "neighbours.png": neighbours_figure(evidence.near, names),
    }


def classes_figure(matrices: Mapping[str, np.ndarray], names: Sequence[str]) -> Figure:
    """Draw accuracy by class as dots, one line per class, sorted by the change through matching."""
    scores = {kind: by_class(matrices[kind]) for kind in KINDS if kind in matrices}
    before = scores.get("gan", scores.get("real", scores["matched"]))
    chosen = extremes(scores["matched"] - before, MOST_CLASSES)
    figure = Figure(figsize=(9, 1.4 + 0.28 * len(chosen)), dpi=DPI, layout="constrained")
    axis = figure.subplots()
    places = np.arange(len(chosen))
    if "gan" in scores:
        axis.hlines(places, before[chosen], scores["matched"][chosen], color="#cccccc", lw=3, zorder=1)
    for kind, values in scores.items():
        axis.scatter(values[chosen], places, color=COLORS[kind], label=WORDS[kind], **MARKS[kind])
    axis.set_yticks(places, [short(names[c]) for c in chosen])
    axis.set_xlim(-2, 102)
    axis.set_ylim(-0.8, len(chosen) - 0.2)
    axis.set_xlabel("accuracy on test (%)")
    rest = "" if len(chosen) == len(names) else f": the {len(chosen)} of {len(names)} that changed most"
    axis.set_title(f"Accuracy by class, sorted by what matching changed{rest}", loc="left", fontsize=11)
    axis.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.9 / figure.get_size_inches()[1]))
    axis.grid(alpha=0.25, axis="x")
    return without_top_and_right(figure)


def confusion_figure(matrices: Mapping[str, np.ndarray], names: Sequence[str]) -> Figure:
    """Draw confusion matrices before and after matching, and their difference. Shares of each true class, in percent."""
    shares = {kind: 100 * m / np.maximum(m.sum(1, keepdims=True), 1) for kind, m in matrices.items()}
    panels = [(WORDS[k], shares[k]) for k in ("gan", "matched") if k in shares]
    size = 4.6 * (len(panels) + ("gan" in shares))
    figure = Figure(figsize=(size, 4.6), dpi=DPI, layout="constrained")
    axes = figure.subplots(1, len(panels) + ("gan" in shares), squeeze=False)[0]
    for axis, (title, values) in zip(axes, panels, strict=False):
        picture = axis.imshow(values, cmap="Blues", vmin=0, vmax=100, interpolation="nearest")
        _name_axes(axis, f"{title}: % of the true class", names)
    figure.colorbar(picture, ax=axes[len(panels) - 1], shrink=0.75)
    if "gan" in shares:
        change = shares["matched"] - shares["gan"]
        limit = max(1.0, float(np.abs(change).max()))
        drawn = axes[-1].imshow(change, cmap="PuOr_r", vmin=-limit, vmax=limit, interpolation="nearest")
        _name_axes(axes[-1], "what matching changed (points)", names)
        figure.colorbar(drawn, ax=axes[-1], shrink=0.75)
    return figure


def _name_axes(axis: Axes, title: str, names: Sequence[str]) -> None:
    axis.set_title(title, loc="left", fontsize=10)
    axis.set_xlabel("predicted class")
    axis.set_ylabel("true class")
    if len(names) <= MOST_NAMES:
        words = [short(n) for n in names]
        axis.set_xticks(range(len(names)), words, rotation=90, fontsize=8)
        axis.set_yticks(range(len(names)), words, fontsize=8)


def answers_figure(answers: Mapping[str, Answers]) -> Figure:
    """Draw densities of a teacher's standardized logits, real and generated; matching should make the curves equal."""
    figure = Figure(figsize=(11, 3.6), dpi=DPI, layout="constrained")
    own, others = figure.subplots(1, 2)
    for axis, title, attribute in (
        (own, "of the image's own class", "own"),
        (others, "of all other classes", "others"),
    ):
        values = {kind: getattr(a, attribute) for kind, a in answers.items()}
        low, high = (f(f(v) for v in values.values()) for f in (min, max))
        edges = np.linspace(low, max(high, low + 1e-3), 41)
        for kind, v in values.items():
            density, _ = np.histogram(v, edges, density=True)
            axis.stairs(density, edges, color=COLORS[kind], lw=WIDTHS[kind], label=WORDS[kind], fill=False)
            axis.axvline(float(v.mean()), color=COLORS[kind], lw=1, ls=":")
        axis.set_title(f"Standardized logits {title}", loc="left", fontsize=11)
        axis.set_xlabel("standard deviations from the sample's mean logit")
        axis.set_ylabel("density")
        axis.grid(alpha=0.25)
    own.legend(frameon=False)
    return without_top_and_right(figure)


def neighbours_figure(near: Near, names: Sequence[str]) -> Figure:
    """Draw random samples beside their nearest training images, and the distances of generated and held-out real images."""
    rows, columns, height = near.shown.shape[:3]
    figure = Figure(figsize=(10, max(3.4, 0.6 + 0.5 * rows)), dpi=max(DPI, height * 2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 3))
    show_rows(left, near.shown, [short(names[c]) for c in near.labels[:, 0]], gap=2, size=8)
    left.set_xticks(
        [(near.shown.shape[3] + 2) * (c + 0.5) - 1.5 for c in range(columns)],
        ["sample", *("1st", "2nd", "3rd")[: columns - 1]],
        fontsize=8,
    )
    left.set_title("Samples and their nearest real images", loc="left", fontsize=11)
    edges = np.histogram_bin_edges(np.concatenate([near.generated, near.held_out]), 30)
    for values, kind, word in (
        (near.held_out, "real", "held-out real (val)"),
        (near.generated, "matched", "generated"),
    ):
        percent = np.full(len(values), 100.0 / len(values))
        right.hist(values, edges, histtype="step", lw=1.8, color=COLORS[kind], label=word, weights=percent)
    right.set_title("Distance to the nearest training image", loc="left", fontsize=11)
    right.set_xlabel("root mean square over pixels (levels of 255)")
    right.set_ylabel("images (%)")
    right.legend(frameon=False)
    right.grid(alpha=0.25)
    return without_top_and_right(figure)
