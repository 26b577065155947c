"""The results of a search for its reader: the table, search.md, search.png."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gdd_dist.reporting.tables import markdown, ruled
from gdd_dist.reporting.training_figures import DPI, png
from sharding.files import write_atomic
from tune import cluster, gang, shared, space, study
from tune.arguments import GRID, METRICS
from tune.final import Gain
from tune.options import Search
from tune.record import DEFAULTS, DIVERGED, FAILED, FINISHED, STOPPED, Outcome, Record
from tune.space import Axis, counted
from tune.study import points

_BEST, _PLAIN, _FINISHED, _OTHER = "#c8553d", "#4c9f70", "#3d6fa5", "#8a8f98"


def write(search: Search, record: Record, best: Outcome, gain: Gain | None) -> None:
    """Write search.md and search.png; print the table and the next line to type."""
    outcomes = ranked(record, search.options.metric)
    write_atomic(search.out / "search.png", png(figure(search, outcomes, best)))
    write_atomic(search.out / "search.md", page(search, record, outcomes, best, gain).encode())
    grid = search.options.algorithm == GRID
    header, lines = study.table(search, record) if grid else table(search, outcomes, best)
    shown = "\n".join(ruled(header, lines, len(search.axes) if grid else 2))
    sys.stdout.write(
        f"\n{shown}\n\n{gained(search, record, best, gain)}\n\n"
        f"page: {search.out}/search.md\nplots: {search.out}/search.png\n"
        f"TensorBoard: tensorboard --logdir {search.out}/tensorboard --host 127.0.0.1\n"
        f"next: {next_line(search)}\n"
    )


def next_line(search: Search) -> str:
    """Return the command that trains on this host with the best settings; the store has all but the report already."""
    o, here = search.options, cluster.this_host()
    gpus = cluster.gpus_of(o, [here])
    fit = here.slots(o.cpus_per_trial, max(1.0, gpus) if gpus else 0.0)  # torchrun's ranks share no GPU
    ranks = gang.with_ranks(search.config, max(1, min(o.ranks_per_trial, fit)))
    file = shlex.quote(str(search.out / "best.yaml"))
    return f"torchrun --nproc_per_node={ranks} -m gdd_dist.train --config {file}"


def ranked(record: Record, metric: str) -> list[Outcome]:
    """Return finished trials, the best first, then the others."""
    outcomes = record.outcomes().values()
    return sorted(outcomes, key=lambda o: (o.status != FINISHED, -o.value(metric), o.id))


def table(search: Search, outcomes: Sequence[Outcome], best: Outcome) -> tuple[list[str], list[list[str]]]:
    """Return (header, lines) of all trials."""
    names = [axis.leaf for axis in search.columns]
    header = ["trial", "status", "val %", "± stderr", "gap", "kept", "steps", "minutes", *names]
    lines = []
    for o in outcomes:
        values = {**space.values(search.columns, search.config), **o.settings}
        name = o.id + (" (defaults)" if o.id == DEFAULTS else "") + (" *" if o.id == best.id else "")
        numbers = [_number(o.val, ".2f"), _number(o.stderr, ".2f"), _number(o.gap, ".1f")]
        cells = [name, o.status, *numbers, _number(o.kept, ","), f"{o.steps:,}", f"{o.seconds / 60:.1f}"]
        lines.append(cells + [space.text(values[a.setting]) for a in search.columns])
    return header, lines


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def gained(search: Search, record: Record, best: Outcome, gain: Gain | None) -> str:
    """Return in words what the search gained, even if it gained nothing."""
    if search.options.algorithm == GRID:
        text = study.said(search, record)
    elif best.id == DEFAULTS:
        text = "No trial was better on val than the defaults: the search gained nothing."
    else:
        text = f"Best on val is trial {best.id}: {best.val:.1f} ± {best.stderr:.1f} %."
    if gain is None:
        return text + " It was not measured on test (--final-seeds 0)."
    r, n = gain.row, len(gain.seeds)
    row = f"{r['student']}, {r['protocol']}, {r['labels']} labels, IPC {r['ipc']}, {r['optimizer_steps']:,} steps"
    arms = f"defaults {np.mean(gain.defaults):.2f} %, GAN before matching {np.mean(gain.gan):.2f} %"
    where = f"On test ({row}; {n} new {'seed' if n == 1 else 'seeds'} of matching and students)"
    if best.id == DEFAULTS:
        return f"{text} {where}: {arms}."
    return f"{text} {where}: best {np.mean(gain.best):.2f} %, {arms}; gain over the defaults {points(gain.difference)} points."


def page(search: Search, record: Record, outcomes: Sequence[Outcome], best: Outcome, gain: Gain | None) -> str:
    """Return the text of search.md."""
    header, lines = table(search, outcomes, best)
    o, m, grid = search.options, search.config.matching, search.options.algorithm == GRID
    faults = [[o.id, o.status, o.reason or ""] for o in outcomes if o.status in (FAILED, DIVERGED)]
    parts = [
        "# Search",
        gained(search, record, best, gain),
        f"Next: `{next_line(search)}`",
        "## Combinations\n\n" + markdown(*study.table(search, record), left=len(search.axes)) if grid else "",
        study.note(search) if grid else "",
        "## Trials",
        markdown(header, lines, left=2),
        f"Trials are compared by {METRICS[o.metric]} (`--metric {o.metric}`); scheduler {o.scheduler}, algorithm {o.algorithm}, seed "
        f"{search.config.seed}. val: accuracy of {m.quick_students} quick students on the validation split, of the interval that "
        f"matching chose (kept 0: the GAN itself); their seeds are the same in all trials{' of a seed' if grid else ''}. `*`: the best"
        f"{', by its combination' if grid else ' of the finished trials'}. The val accuracy of the best of many trials is too high by "
        "chance. The gain is not: it uses test, for the only time, and new seeds.",
        "![Accuracy on val against each searched setting](search.png)",
        "## Gain" if gain else "",
        _gain_table(gain) if gain else "",
        "## Cost",
        cost(search, record, outcomes),
        "## Trials that failed" if faults else "",
        markdown(("trial", "status", "reason"), faults, 3) if faults else "",
        "## Space",
        "```yaml\n" + space.dump(search.axes).strip() + "\n```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _gain_table(gain: Gain) -> str:
    header = ("seed", "best %", "defaults %", "GAN %", "gain, points")
    rows = [*zip(gain.seeds, gain.best, gain.defaults, gain.gan, strict=True)]
    lines = [[str(s), f"{b:.2f}", f"{d:.2f}", f"{g:.2f}", f"{b - d:+.2f}"] for s, b, d, g in rows]
    means = [f"{np.mean(values):.2f}" for values in (gain.best, gain.defaults, gain.gan)]
    table = markdown(header, [*lines, ["mean", *means, points(gain.difference)]])
    what = "Accuracy on test, a seed's mean over its students; ± is the standard error of the mean over seeds."
    return f"{what}\n\n{table}"


def cost(search: Search, record: Record, outcomes: Sequence[Outcome]) -> str:
    """Return a table of the rank-hours spent and saved."""
    ranks = search.options.ranks_per_trial
    spent = sum(o.seconds for o in outcomes) * ranks
    whole = [o.seconds for o in outcomes if o.status == FINISHED]
    stopped = [o for o in outcomes if o.status == STOPPED]
    early = sum(max(0.0, float(np.mean(whole)) - o.seconds) for o in stopped) * ranks if whole else 0.0
    once = shared.cost(record.out)
    again = once * (len(outcomes) - 1)
    every, ended = counted(len(outcomes), "trial"), counted(len(stopped), "trial")
    lines = [
        ["trials", _hours(spent), f"{every}, {sum(o.steps for o in outcomes):,} matching steps"],
        ["shards, teachers, logits, GAN, once", _hours(once), "" if once else "computed by another run on this store"],
        ["saved by early stopping", _hours(early), f"{ended} stopped, against the mean finished trial"],
        ["saved by reuse", _hours(again), f"against computing them for each of {every}"],
    ]
    return markdown(("", "rank-hours", ""), lines)


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.3f}"


def figure(search: Search, outcomes: Sequence[Outcome], best: Outcome) -> Figure:
    """Return plots of the accuracy on val against each searched setting."""
    axes = search.columns
    columns = min(4, len(axes))
    rows = -(-len(axes) // columns)
    fig = Figure(figsize=(3.6 * columns, 3.0 * rows), dpi=DPI, layout="constrained")
    grid = fig.subplots(rows, columns, squeeze=False).ravel()
    for axis, plot in zip(axes, grid, strict=False):
        _scatter(plot, axis, search, [o for o in outcomes if o.val is not None], best)
    for plot in grid[len(axes) :]:
        plot.set_axis_off()
    grid[0].legend(frameon=False, fontsize=7)
    return fig


def _scatter(plot: Axes, axis: Axis, search: Search, outcomes: Sequence[Outcome], best: Outcome) -> None:
    shown, plain = set[str](), space.values([axis], search.config)[axis.setting]
    choices = list(dict.fromkeys([*axis.choices, plain]))  # the defaults may be none of them
    for o in outcomes:
        x = o.settings.get(axis.setting, plain)
        names = [name for name, trial in (("best", best.id), ("defaults", DEFAULTS)) if o.id == trial]
        kind = " = ".join(names) or o.status
        color = _FINISHED if o.status == FINISHED else _OTHER
        color = _BEST if o.id == best.id else _PLAIN if o.id == DEFAULTS else color
        label = kind if kind not in shown else None
        shown.add(kind)
        style: dict[str, Any] = {"ms": 4, "lw": 1, "capsize": 2, "color": color, "label": label}
        x = choices.index(x) if axis.choices else x
        plot.errorbar(x, o.val or 0.0, o.stderr or 0.0, fmt="o", **style)
    if axis.choices:
        plot.set_xticks(range(len(choices)), [str(c) for c in choices])
    elif axis.log:
        plot.set_xscale("symlog", linthresh=axis.low, linscale=0.3) if axis.zero else plot.set_xscale("log")
        marks = [*([0.0] if axis.zero else []), *np.geomspace(axis.low, axis.high, 4)]
        plot.set_xticks(marks, [f"{m:.2g}" for m in marks])
        plot.minorticks_off()
    plot.set_xlabel(axis.setting)
    plot.set_ylabel("val accuracy (%)")
    plot.grid(alpha=0.25)
    plot.spines[["top", "right"]].set_visible(False)
