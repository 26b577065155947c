"""samples.png and curves.png. Figures are drawn on their own Agg canvas: no display, no global state."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gdd_dist.evaluation.kinds import kind_of

COLORS = {
    "real": "#4c9f70",
    "equal_bytes": "#8fbf9f",
    "gaussian": "#d6b656",
    "gan": "#8a8f98",
    "matched": "#c8553d",
    "full": "#3d6fa5",
}
CYCLE = ("#3d6fa5", "#c8553d", "#4c9f70", "#8a6fb0", "#b08a3d", "#8a8f98")
DPI = 120
LONGEST_NAME = 24
SHORT_BAR = 25.0
"""Accuracy in percent up to which a bar is too short for its label."""

Curves = dict[str, tuple[list[int], list[float]]]
"""Tag → (steps, values)."""


def png(figure: Figure) -> bytes:
    """Return the figure as PNG bytes."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def pixels(figure: Figure) -> np.ndarray:
    """Return the figure as uint8 [H, W, 3]."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def mosaic(images: np.ndarray, gap: int) -> np.ndarray:
    """Join uint8 images [rows, columns, H, W, C] to a picture [H', W', C] with white lines of ``gap`` pixels between them."""
    rows, columns, height, width, channels = images.shape
    framed = np.pad(images, ((0, 0), (0, 0), (0, gap), (0, gap), (0, 0)), constant_values=255)
    joined = framed.swapaxes(1, 2).reshape(rows * (height + gap), columns * (width + gap), channels)
    return joined[:-gap, :-gap]


def show_rows(axis: Axes, images: np.ndarray, names: Sequence[str], gap: int, size: int) -> None:
    """Draw uint8 images [rows, columns, H, W, C] as a mosaic without a frame, with a name in letters of ``size`` beside each row."""
    middles = [(images.shape[2] + gap) * r + images.shape[2] / 2 - 0.5 for r in range(len(images))]
    axis.imshow(mosaic(images, gap).squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axis.set_yticks(middles, names, fontsize=size)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)


def without_top_and_right(figure: Figure) -> Figure:
    """Return the figure, whose axes have lost two sides of their frames."""
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def short(name: str) -> str:
    """Shorten a class name for an axis; dollar signs are escaped, so that they do not begin a formula."""
    return (name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…").replace("$", r"\$")


def samples_figure(panels: Mapping[str, np.ndarray], names: Sequence[str]) -> Figure:
    """Draw panels side by side, title → uint8 images [classes, columns, H, W, C]; a row for each class."""
    first = next(iter(panels.values()))
    rows, columns, height = first.shape[:3]
    names = [short(n) for n in names]
    inch = 0.45
    words = 0.3 + 0.08 * max(len(n) for n in names)
    size = (words + len(panels) * (columns * inch + 0.15), rows * inch + 0.6)
    layout = ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.06)
    figure = Figure(figsize=size, dpi=max(DPI, int(np.ceil(height / inch))), layout=layout)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for i, (axis, (title, images)) in enumerate(zip(axes, panels.items(), strict=True)):
        show_rows(axis, images, names if i == 0 else [""] * rows, gap=1, size=9)
        axis.set_title(title, fontsize=10)
        axis.set_xticks([])
    return figure


def read_curves(directory: Path) -> Curves:
    """Return all scalars of one step's event files; empty if there are none (another run computed the step)."""
    if not directory.is_dir():
        return {}
    events = EventAccumulator(str(directory), size_guidance={"scalars": 0, "images": 1, "histograms": 1, "tensors": 1})
    events.Reload()
    found: Curves = {}
    for tag in events.Tags()["scalars"]:
        points = {e.step: e.value for e in events.Scalars(tag)}  # if a step was logged twice, the later value counts
        found[tag] = (sorted(points), [points[s] for s in sorted(points)])
    return found


def curves_figure(
    teachers: Sequence[Mapping[str, Any]],
    curves: Mapping[str, Curves],
    history: Sequence[Mapping[str, Any]],
    kept: int | None,
    results: Sequence[Mapping[str, Any]],
) -> Figure:
    """Draw the curves of all steps on one page. ``curves``: by step; ``kept``: matching's selected interval."""
    figure = Figure(figsize=(15, 8), dpi=DPI, layout="constrained")
    grid = figure.subplots(2, 3)
    _teachers(grid[0, 0], teachers)
    _losses(grid[0, 1], "GAN: losses", curves.get("gan", {}), ("gan/loss_g", "gan/loss_d"))
    tags = ("matching/loss", "matching/pair", "matching/mean", "matching/adv")
    _losses(grid[0, 2], "Matching: loss and its terms, unweighted", curves.get("matching", {}), tags)
    _history(grid[1, 0], history, kept)
    _gap(grid[1, 1], history, kept)
    _accuracies(grid[1, 2], results)
    return without_top_and_right(figure)


def _titled(axis: Axes, title: str, x: str, y: str, drawn: bool, why: str = "") -> None:
    axis.set_title(title, fontsize=11, loc="left")
    if drawn:
        axis.set_xlabel(x)
        axis.set_ylabel(y)
        axis.grid(alpha=0.25)
    else:
        axis.set_axis_off()
        axis.text(0.5, 0.5, why, ha="center", va="center", color="#777777", transform=axis.transAxes)


def _teachers(axis: Axes, teachers: Sequence[Mapping[str, Any]]) -> None:
    """Draw the snapshots of each training as a line."""
    names = list(dict.fromkeys(t["architecture"] for t in teachers))
    for i, name in enumerate(names):
        for seed in sorted({t["seed"] for t in teachers if t["architecture"] == name}):
            own = sorted(
                (t["step"], t["val_accuracy"]) for t in teachers if (t["architecture"], t["seed"]) == (name, seed)
            )
            axis.plot(
                *zip(*own, strict=True), "o-", ms=4, lw=1, color=CYCLE[i % len(CYCLE)], label=name if not seed else None
            )
    axis.set_xscale("log")
    marks = sorted({t["step"] for t in teachers})
    axis.set_xticks(marks, [f"{s:,}" for s in marks])
    axis.minorticks_off()
    _titled(axis, "Teachers: snapshots on val", "step", "accuracy (%)", True)
    axis.legend(frameon=False, fontsize=9)


def _losses(axis: Axes, title: str, curves: Curves, tags: Sequence[str]) -> None:
    """Draw logged scalars as faint lines, with running means over a tenth of the steps on top."""
    drawn = [t for t in tags if t in curves]
    for i, tag in enumerate(drawn):
        steps, values = curves[tag]
        smooth = _running_mean(np.array(values), max(1, len(values) // 20))
        axis.plot(steps, values, color=CYCLE[i], alpha=0.25, lw=0.8)
        axis.plot(steps, smooth, color=CYCLE[i], lw=1.5, label=tag.partition("/")[2])
    if drawn:
        late = np.concatenate([curves[t][1][len(curves[t][1]) // 20 :] for t in drawn])
        low, high = np.quantile(late, [0.002, 0.998])
        pad = 0.08 * (high - low) or 0.1
        axis.set_ylim(low - pad, high + 3 * pad)  # space for the legend, because searching for the best place is slow
        axis.legend(frameon=False, fontsize=9, loc="upper right", ncols=4)
    _titled(axis, title, "step", "loss", bool(drawn), "no curve here: the step was computed by another run")


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    sums = np.cumsum(np.insert(values, 0, 0.0))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    means: np.ndarray = (sums[ends] - sums[starts]) / (ends - starts)
    return means


def _history(axis: Axes, history: Sequence[Mapping[str, Any]], kept: int | None) -> None:
    if history:
        steps, val, err = ([h[k] for h in history] for k in ("step", "val", "stderr"))
        axis.errorbar(steps, val, err, fmt="o-", ms=4, lw=1.5, capsize=3, color=COLORS["matched"])
        axis.axhline(val[0], color=COLORS["gan"], lw=1, ls="--", label="before matching")
        if kept is not None:
            _mark(axis, kept)
        axis.legend(frameon=False, fontsize=9)
    _titled(
        axis, "Quick students on val", "matching step", "accuracy (%), ± standard error", bool(history), "not measured"
    )


def _gap(axis: Axes, history: Sequence[Mapping[str, Any]], kept: int | None) -> None:
    if history:
        axis.plot([h["step"] for h in history], [h["gap"] for h in history], "o-", ms=4, lw=1.5, color=CYCLE[3])
        axis.axhline(0, color="#bbbbbb", lw=0.8)
        if kept is not None:
            _mark(axis, kept)
            axis.legend(frameon=False, fontsize=9)
    _titled(axis, "Shortcut gap: fresh images minus val", "matching step", "points", bool(history), "not measured")


def _mark(axis: Axes, kept: int) -> None:
    axis.axvline(kept, color="#333333", lw=0.9, ls=":", label=f"kept: step {kept}")


def _accuracies(axis: Axes, results: Sequence[Mapping[str, Any]]) -> None:
    """Draw the rows of the first student and IPC as bars, by protocol and labels; all real data as a line."""
    rows = [r for r in results if r["ipc"] is not None]
    rows = [r for r in rows if (r["student"], r["ipc"]) == (rows[0]["student"], rows[0]["ipc"])]
    groups = list(dict.fromkeys((r["protocol"], r["labels"]) for r in rows))
    kinds = list(dict.fromkeys(kind_of(r) for r in rows))
    height = 0.8 / len(kinds)
    for r in rows:
        y = groups.index((r["protocol"], r["labels"])) + (kinds.index(kind_of(r)) - (len(kinds) - 1) / 2) * height
        axis.barh(y, r["mean"], height * 0.92, xerr=r["std"] or 0.0, color=COLORS[r["train_on"]], error_kw={"lw": 1})
        long = r["mean"] > SHORT_BAR
        place, color = (1, "white") if long else (r["mean"] + (r["std"] or 0.0) + 1, "#333333")
        axis.text(place, y, f"{kind_of(r)} {r['mean']:.1f}", va="center", fontsize=8, color=color)
    for r in results:
        if r["train_on"] == "full" and r["student"] == rows[0]["student"]:
            axis.axvline(r["mean"], color=COLORS["full"], lw=1.2, ls="--", label=f"all real data {r['mean']:.1f}")
            axis.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    axis.set_yticks(range(len(groups)), ["\n".join(g) for g in groups])
    axis.invert_yaxis()
    axis.set_xlim(0, 100)
    _titled(
        axis, f"Test accuracy: {rows[0]['student']}, IPC {rows[0]['ipc']}", "accuracy (%), ± std over seeds", "", True
    )
