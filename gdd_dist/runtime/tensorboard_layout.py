"""What TensorBoard needs to show at a glance whether a run is healthy: units, a page with the main curves, hparams."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams as hparams_summaries

UNITS = {
    "loss": "loss minimised, no unit",
    "loss_g": "generator's adversarial loss, no unit; balances loss_d; neither should fall to 0 or diverge",
    "loss_d": "discriminator's loss without penalties, no unit; ln 2 = 0.69 means that it cannot tell real from generated",
    "pair": "pair loss (--matching.loss) of the teachers' logits, generated against real, no unit, unweighted",
    "mean": "squared distance of mean logits, logits squared, unweighted; may be negative (its bias is subtracted)",
    "adv": "generator's adversarial loss in matching, no unit, unweighted",
    "lr": "learning rate",
    "gamma": "weight of the gradient penalties",
    "images_per_second": "images per second since this invocation began, all ranks together",
    "val_accuracy": "percent of val; matching: mean of quick students trained on fresh draws; teachers: over the pool",
    "val_stderr": "percentage points, standard error over quick students",
    "shortcut_gap": "percentage points: accuracy on fresh generated images minus on val; grows when images encode their class as a pattern",
    "accuracy": "percent of test, mean over student seeds, over IPC",
}

# Charts of TensorBoard's "Custom scalars" page in reading order, with regular expressions of their tags.
LAYOUT: dict[str, dict[str, list[str]]] = {
    "Is it healthy?": {
        "1 teachers learn (loss falls)": [r"teachers/loss/.*"],
        "2 GAN: ■ loss_g, ◆ loss_d; neither runs away": [r"gan/loss_g", r"gan/loss_d"],
        "3 matching: ■ pair, ◆ mean, ▲ adv, unweighted": [r"matching/pair", r"matching/mean", r"matching/adv"],
        "4 matching helps (quick students on val, %)": [r"matching/val_accuracy"],
        "5 no shortcut (gap in points stays flat)": [r"matching/shortcut_gap"],
        "6 speed (images per second, a curve for each step)": [r".*/images_per_second"],
    },
    "Results: accuracy on test, % over IPC": {
        f"{protocol}, {labels} labels": [rf"report/accuracy/.*/{protocol}/{labels}"]
        for protocol in ("regenerate", "fixed")
        for labels in ("hard", "soft")
    },
}


def scalar(tag: str, value: float) -> Summary:
    """Return a point of tag STEP/NAME or STEP/NAME/…, with a description that gives meaning and unit."""
    name = tag.split("/")[1] if "/" in tag else tag
    plugin = SummaryMetadata.PluginData(plugin_name="scalars")  # without it, readers print a warning for each tag
    metadata = SummaryMetadata(summary_description=UNITS.get(name, ""), plugin_data=plugin)
    return Summary(value=[Summary.Value(tag=tag, simple_value=float(value), metadata=metadata)])


def write_layout(directory: Path) -> None:
    """Write the page of charts, replacing an earlier one."""
    with SummaryWriter(str(directory), purge_step=0) as writer:
        lines = {page: {n: ("Multiline", tags) for n, tags in charts.items()} for page, charts in LAYOUT.items()}
        writer.add_custom_scalars(lines)


def hparams(settings: Mapping[str, Any], results: Mapping[str, float]) -> tuple[Summary, ...]:
    """Return the run's row in TensorBoard's HPARAMS page, for the run's directory (add_hparams would create a new directory).

    ``settings``: flat; values that are neither numbers nor text become text. ``results``: by the tag of their scalar.
    """
    flat = {k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in settings.items() if v is not None}
    return hparams_summaries(flat, dict(results))
