"""report.md: the page a reader opens first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gdd_dist.context import Context
from gdd_dist.metrics import changed, selected
from gdd_dist.settings import SECTIONS
from gdd_dist.tables import NONE, headline, markdown, markdown_table


def page(
    ctx: Context,
    fingerprints: Mapping[str, str],
    metrics: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    steps: Mapping[str, Any],
) -> str:
    """The page as Markdown. ``metrics``: metrics.json's content; ``steps``: steps.json's, of this invocation."""
    m = ctx.manifest
    shape = f"{m.height}×{m.width}, {m.channels} {'channel' if m.channels == 1 else 'channels'}"
    sizes = ", ".join(f"{name} {split.samples:,}" for name, split in m.splits.items())
    parts = [
        f"# Distilled: {m.name}",
        headline(metrics["results"]),
        f"Data: {m.name}, {ctx.classes} classes, {shape}; {sizes} images. {_verified(metrics)}",
        "## Rows",
        markdown_table(metrics["results"]),
        _legend(ctx),
        "![Real images, the GAN's, the matched generator's](samples.png)",
        "![Curves](curves.png)",
        "## Matching",
        _matching(ctx, history),
        "## Where the time went",
        _timings(steps),
        "## Settings",
        "```yaml\n" + _settings(ctx) + "\n```",
        "## Provenance",
        _provenance(fingerprints, metrics),
    ]
    return "\n\n".join(parts) + "\n"


def _verified(metrics: Mapping[str, Any]) -> str:
    if metrics["verified"]:
        return "Every file that was read was hashed first."
    return "**The files that were read were not hashed (`--no-verify`).**"


def _legend(ctx: Context) -> str:
    r = ctx.config.report
    return (
        f"Accuracy on `test` after the last step, mean ± standard deviation over {r.seeds} student "
        f"{'seed' if r.seeds == 1 else 'seeds'} (ddof 1), in percent. `regenerate` trains on a fresh set of IPC images per class "
        "each epoch, `fixed` on one set drawn once. `real` at the same budget: under `regenerate` with hard labels it is the "
        "ceiling, which no generator that only imitates can pass; under `fixed` it is the floor to beat. `gan` is the generator "
        "before matching, `full` all real data on its own budget. `soft` labels are the mean of the teachers' answers. Ceiling "
        "share: how far from chance to the ceiling of the same student and IPC a row gets. The students of one seed share initial "
        "weights, order, latents and augmentation, whatever they train on."
    )


def _matching(ctx: Context, history: Sequence[Mapping[str, Any]]) -> str:
    m = ctx.config.matching
    kept = selected(history, m.select)
    if kept is None:
        return "The generator's file holds no measurements."
    lines = [
        [
            f"{h['step']:,}",
            f"{h['val']:.1f}",
            f"{h['stderr']:.1f}",
            f"{h['gap']:.1f}",
            "kept" if h is kept else "",
        ]
        for h in history
    ]
    text = (
        f"Quick students ({m.quick_students} × {m.quick_student}, {m.quick_steps:,} steps of {m.quick_batch}) on fresh draws, "
        f"measured on `val`; step 0 is the GAN itself. `matching.select: {m.select}` kept step {kept['step']:,}. The shortcut gap "
        "is their accuracy on fresh generated images minus that on `val`, in points: it grows when the generator writes the class "
        "into the image as a pattern that only those who saw such images can read."
    )
    header = ("step", "val accuracy %", "standard error", "shortcut gap", "")
    return text + "\n\n" + markdown(header, lines, left=0)


def _timings(steps: Mapping[str, Any]) -> str:
    lines = [[name, s["status"], f"{s['seconds']:,.1f}", f"{s['images_processed']:,}"] for name, s in steps.items()]
    text = markdown(("step", "status", "seconds", "images through a network"), lines, left=2)
    return text + "\n\nIn the invocation that wrote this page; a reused step was computed before."


def _settings(ctx: Context) -> str:
    """Every setting that shapes numbers; those that say where or how fast are left out."""
    lines = [f"seed: {ctx.config.seed}", f"precision: {ctx.precision}"]
    for section in SECTIONS:
        lines.append(f"{section}:")
        own = getattr(getattr(ctx.config, section), "seed", None)
        values = ({"seed": own} if own is not None else {}) | ctx.config.shaping(section)
        lines += [f"  {name}: {_yaml(value)}" for name, value in values.items()]
    return "\n".join(lines)


def _yaml(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(_yaml(v) for v in value) + "]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _provenance(fingerprints: Mapping[str, str], metrics: Mapping[str, Any]) -> str:
    h, v = metrics["hardware"], metrics["versions"]
    device = "" if h["device"] == "cpu" else f"{h['device']}; "
    lines = [[name, f"`{fp}`"] for name, fp in fingerprints.items()]
    lines += [
        ["commit", f"`{metrics['commit']}`{', changed since' if changed() else ''}" if metrics["commit"] else NONE],
        ["hardware", f"{device}{h['cpu']}, {h['cores']} cores, {h['ranks']} {'rank' if h['ranks'] == 1 else 'ranks'}"],
        ["versions", ", ".join(f"{name} {number}" for name, number in v.items())],
    ]
    return markdown(("", ""), lines, left=2)
