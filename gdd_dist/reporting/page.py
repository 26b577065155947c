"""report.md: the page that a reader opens first. report.html is the same page (see html_page.py)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gdd_dist.config.settings import SECTIONS
from gdd_dist.evaluation.confusion import by_class
from gdd_dist.evaluation.ddranking import score
from gdd_dist.evaluation.quick_students import INTERVAL, Candidates
from gdd_dist.reporting.accuracy_picture import PICTURE
from gdd_dist.reporting.diagnostics import NEAR_SIDE, Evidence
from gdd_dist.reporting.tables import NONE, differs, headline, markdown, markdown_table, number
from gdd_dist.reporting.verdict import answer, comparison, differences, first_screen
from gdd_dist.runtime.versions import changed
from gdd_dist.storage.printable import printable
from gdd_dist.training.context import Context

MOST_CLASSES = 40


def page(
    ctx: Context,
    fingerprints: Mapping[str, str],
    metrics: Mapping[str, Any],
    candidates: Candidates,
    costs: Mapping[str, Mapping[str, Any]],
    evidence: Evidence,
) -> str:
    """Return the page as Markdown. ``metrics``: the content of metrics.json; ``costs``: by step, when it was computed."""
    m, found = ctx.manifest, differences(first_screen(metrics["results"]))
    shape = f"{m.height}×{m.width}, {m.channels} {'channel' if m.channels == 1 else 'channels'}"
    sizes = ", ".join(f"{name} {split.samples:,}" for name, split in m.splits.items())
    parts = [
        f"# Distilled: {word(printable(m.name))}",
        answer(found),
        f"![Accuracy between floor and ceiling]({PICTURE})",
        headline(metrics["results"]),
        comparison(found),
        f"Data: {word(printable(m.name))}, {ctx.classes} classes, {shape}; {sizes} images. {_verified(metrics)}",
        "![Real images, the GAN's, the matched generator's](samples.png)",
        "## Rows",
        markdown_table(metrics["results"]),
        _legend(ctx, metrics["results"]),
        "## Classes",
        _classes(ctx, evidence),
        "![Accuracy by class](classes.png)",
        "![Confusion matrices](confusion.png)",
        "## Training",
        "![Curves](curves.png)",
        _matching(ctx, candidates),
        "## Teacher logits",
        "The standardized logits of the best last teacher, for real training images, for the GAN's and for the matched generator's "
        "images of the same classes: matching should make the generated curves equal to the real one. Dotted lines: means.",
        "![Teacher logits](answers.png)",
        "## Does it memorise?",
        _near(metrics["nearest"]),
        "![Nearest real neighbours](neighbours.png)",
        "## What it cost",
        _costs(costs),
        "## How to reproduce it",
        _reproduce(ctx, metrics),
        "## Provenance",
        _provenance(fingerprints, metrics),
    ]
    return "\n\n".join(parts) + "\n"


def word(name: str) -> str:
    """Escape a name for running text, so that HTML in it is shown as text."""
    return name.replace("&", "&amp;").replace("<", "&lt;")


def _verified(metrics: Mapping[str, Any]) -> str:
    if metrics["verified"]:
        return "The sha256 of every input file was checked first."
    return "**The sha256 of input files was not checked (`--no-verify`).**"


def _legend(ctx: Context, results: Sequence[Mapping[str, Any]]) -> str:
    r = ctx.config.report
    text = (
        f"Accuracy on `test` after the last step, mean ± standard deviation over {r.seeds} student "
        f"{'seed' if r.seeds == 1 else 'seeds'} (ddof 1), in percent. `regenerate` trains on a new set of IPC images per class "
        "each epoch, `fixed` on the same set in all epochs. `real` has the same budget: with `regenerate` and hard labels it is the "
        "ceiling, which a generator that only imitates cannot exceed; with `fixed` it is the floor to beat. `gan` is the generator "
        "before matching, `full` all real data with its own budget. `soft` labels are the mean of the teachers' softmax. Ceiling "
        "share: the position of a row between chance and the ceiling of the same student and IPC. The students of one seed share "
        "initial weights, order, latents and augmentation, whatever they train on."
    )
    if any(differs(one) for one in results):
        text += " Balanced: the mean of the classes' accuracies, because the classes of `test` have different sizes."
    if any(one.get("lrs") is not None for one in results):
        text += (
            " LRS and ARS are DD-Ranking's label-robust and augmentation-robust scores (0 to 1, w = γ = 1/2): how much of an accuracy "
            "comes from the images, not from soft labels (LRS) or augmentation (ARS). Images as good as random real ones of the same "
            f"number, and no worse than all real data, would score {score(0.0):.3f}."
        )
    return text


def _classes(ctx: Context, evidence: Evidence) -> str:
    """Return accuracy by class as a table, if there are few enough classes."""
    row, matrices = evidence.row, evidence.matrices
    text = (
        f"On `test`, students {row.student} on {row.ipc} {'image' if row.ipc == 1 else 'images'} per class, {row.protocol}, "
        f"{row.labels} labels, all student seeds together."
    )
    kinds = [k for k in ("real", "gan", "matched") if k in matrices]
    if ctx.classes > MOST_CLASSES:
        return text
    scores = {k: by_class(matrices[k]) for k in kinds}
    lines = [[name, *(_percent(scores[k][c]) for k in kinds)] for c, name in enumerate(ctx.class_names)]
    return text + "\n\n" + markdown(("class", *(f"{k} %" for k in kinds)), lines)


def _percent(value: float) -> str:
    return NONE if np.isnan(value) else f"{value:.1f}"


NAMES = {
    "gaussian": "the Gaussian of each class",
    "gan": "the GAN itself",
}
"""Candidates that matching does not train, and generators from which it starts."""


def _matching(ctx: Context, candidates: Candidates) -> str:
    m, found = ctx.config.matching, candidates.kept(ctx.config.matching.select)
    if found is None:
        return "The generator's file contains no measurements."
    name, kept = found

    def line(what: str, one: Mapping[str, Any]) -> list[str]:
        return [what, f"{one['val']:.1f}", f"{one['stderr']:.1f}", f"{one['gap']:.1f}", "kept" if one is kept else ""]

    lines = [line(NAMES.get(other, other), one) for other, one in candidates.others.items()]
    lines += [line(f"step {h['step']:,}", h) for h in candidates.history]
    what = f"step {kept['step']:,}" if name == INTERVAL else NAMES.get(name, name)
    text = (
        f"Quick students ({m.quick_students} × {m.quick_student}, {m.quick_steps:,} steps of {m.quick_batch}) on fresh draws, "
        f"measured on `val`; step 0 is {NAMES[m.start]}. `matching.select: {m.select}` kept {what}. The shortcut gap "
        "is their accuracy on fresh generated images minus that on `val`, in points: it grows when the generator encodes the class "
        "as a pattern that only students trained on such images recognize."
    )
    header = ("generator", "val accuracy %", "standard error", "shortcut gap", "")
    return text + "\n\n" + markdown(header, lines)


def _near(near: Mapping[str, float]) -> str:
    return (
        f"The median distance from a generated image to the nearest training image is {near['median_generated']:.1f} levels (of 255, "
        f"root mean square over pixels); from a held-out real image (val) it is {near['median_held_out']:.1f}. "
        f"**{near['close_share']:.1f} %** of generated images are closer to a training image than the closest 1 % of held-out ones: "
        "far more than 1 % means that training images are copied, or that images are smoother than real ones. Distances are between "
        f"pixels, after larger images are averaged down to {NEAR_SIDE} pixels; a shifted or recoloured copy is not found."
    )


def _costs(costs: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [
        [name, c["status"], number(c["seconds"], ",.1f"), number(c["images_processed"], ","), str(c["ranks"] or NONE)]
        for name, c in costs.items()
    ]
    total = sum(c["seconds"] or 0 for c in costs.values())
    text = markdown(("step", "status", "seconds", "images forwarded", "ranks"), lines, left=2)
    return (
        f"{text}\n\n{total:,.0f} seconds in total. Status: in the run that wrote this page; seconds and images: when the step was "
        "computed (for a resumed step, since it was last resumed)."
    )


def _reproduce(ctx: Context, metrics: Mapping[str, Any]) -> str:
    """Return the command and every setting that changes results; those that change only where or how fast are left out."""
    commit = f"git checkout {metrics['commit']}\n" if metrics["commit"] else ""
    ranks = metrics["hardware"]["ranks"]
    start = "python" if ranks == 1 else f"torchrun --nproc_per_node={ranks}"
    return (
        f"Use the data set whose fingerprint is below (`python -m sharding info DATA` prints it) and the settings in `settings.yaml`:\n\n"
        f"```sh\n{commit}{start} -m gdd_dist.train --config settings.yaml --data DATA --out OUT\n```\n\n"
        f"```yaml\n{_settings_yaml(ctx)}\n```\n\n"
        "The results are equal bit for bit on the same kind of CPU with the same number of ranks and threads; elsewhere up to rounding."
    )


def _settings_yaml(ctx: Context) -> str:
    """Return every setting that changes results, as YAML for --config."""
    lines = [f"seed: {ctx.config.seed}", f"precision: {ctx.precision}"]
    for section in SECTIONS:
        lines.append(f"{section}:")
        own = getattr(getattr(ctx.config, section), "seed", None)
        values = ({"seed": own} if own is not None else {}) | ctx.config.shaping(section)
        lines += [f"  {name}: {_yaml(value)}" for name, value in values.items() if value is not None]
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
        ["commit", f"`{metrics['commit']}`{', then changed' if changed() else ''}" if metrics["commit"] else NONE],
        ["hardware", f"{device}{h['cpu']}, {h['cores']} cores, {h['ranks']} {'rank' if h['ranks'] == 1 else 'ranks'}"],
        ["versions", ", ".join(f"{name} {number}" for name, number in v.items())],
    ]
    return markdown(("what", "value"), lines, left=2)
