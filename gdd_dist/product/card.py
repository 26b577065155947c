"""The card of an exported set: DEST/README.md in the format of the Hugging Face hub, and its grid of samples."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from gdd_dist.product.sampler import Sampler
from gdd_dist.reporting.tables import headline, markdown_table
from gdd_dist.runtime.monitor import say
from gdd_dist.storage.json_files import read_json
from gdd_dist.training.sample_grid import as_png, enlarged_grid
from sharding.errors import UserError

GRID_CLASSES, GRID_COLUMNS = 20, 10
REPORT = Path("report") / "latest" / "metrics.json"
_FILES = {"webdataset": "train/*.tar", "folder": "*/*.png"}
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


@dataclass(frozen=True)
class Drawn:
    """How a set is drawn. ``total``: number of images; ``ipc``: images per class, None if a total was requested."""

    total: int
    ipc: int | None
    format: str
    soft: bool
    seed: int
    truncation: float | None
    licence: str
    condense: int = 0
    """Steps in which the teachers moved the latents."""


def card(generator: Sampler, drawn: Drawn, run: Path) -> str:
    """Return the card as Markdown with a YAML head. ``run``: a run directory, whose report gives the figures if it has one."""
    channels, height, width = generator.image_shape
    size = f"{drawn.ipc} of each of " if drawn.ipc else "of "
    size += f"{len(generator.classes)} classes"
    parts = [
        f"---\n{yaml.safe_dump(_head(generator, drawn), sort_keys=False, allow_unicode=True)}---",
        f"# {generator.data_name}, distilled: {drawn.total:,} images, {size}",
        f"Images of {height}×{width} with {'1 channel' if channels == 1 else f'{channels} channels'}, drawn from a generator that was "
        f"distilled from {generator.data_name}. They are meant for training a classifier in place of the real images.",
        "![Samples: a row for each class](samples.png)",
        "## Use",
        _usage(drawn),
        "## How it was made",
        "By generative dataset distillation with standardized self-knowledge distillation (gdd_dist): a pool of classifiers is "
        "trained on the real data, a conditional GAN is trained, then the generator is trained until the classifiers' standardized "
        "logits on its images have the same distribution as on real images of the same class. The run's report shows the "
        "nearest real neighbours of random samples.",
        _labels(drawn),
        _drawing(drawn),
        "## Figures",
        _figures(run),
        "## Classes",
        ", ".join(f"{i} {name}" for i, name in enumerate(generator.classes)),
        "## Licence",
        f"{drawn.licence}. The set is derived from {generator.data_name}, so the terms of that data set apply.",
        "## Provenance",
        _provenance(generator.meta.get("provenance", {})),
    ]
    return "\n\n".join(parts) + "\n"


def _head(generator: Sampler, drawn: Drawn) -> dict[str, Any]:
    found: dict[str, Any] = {
        "license": drawn.licence,
        "pretty_name": f"{generator.data_name} distilled",
        "task_categories": ["image-classification"],
        "tags": ["dataset-distillation", "synthetic", "gdd_dist"],
        "size_categories": [next((name for most, name in _SIZES if drawn.total < most), "n>1M")],
    }
    if drawn.format in _FILES:
        files = {"split": "train", "path": _FILES[drawn.format]}
        found["configs"] = [{"config_name": "default", "data_files": [files]}]
    return found


def _usage(drawn: Drawn) -> str:
    """Return how to read the set in its format."""
    if drawn.format == "webdataset":
        soft = ', row["soft.npy"]' if drawn.soft else ""
        text = f"""import glob

import datasets
import webdataset

rows = datasets.load_dataset("DEST", split="train")  # row["png"], row["cls"]{soft}
shards = sorted(glob.glob("DEST/train/*.tar"))
rows = webdataset.WebDataset(shards, shardshuffle=False).decode("torchrgb")  # the same keys"""
    elif drawn.format == "folder":
        text = """from torchvision.datasets import ImageFolder

images = ImageFolder("DEST")            # class numbers follow the folders 0000_NAME, 0001_NAME, …"""
        text += "\n# soft labels: numpy.load of FILE.soft.npy beside FILE.png, float32 [classes]" if drawn.soft else ""
    else:
        soft = ", soft float32 [N, classes]" if drawn.soft else ""
        text = f"""import numpy as np

data = np.load("DEST/train.npz")         # images uint8 [N, channels, height, width], labels int64 [N], classes{soft}"""
    return f"```python\n{text}\n```\n\nDEST is this directory."


def _labels(drawn: Drawn) -> str:
    soft = ", and beside it the mean of the teachers' softmax on the unaugmented image (float32, one number per class)"
    return f"Labels: the class that each image was drawn for{soft if drawn.soft else ''}."


def _drawing(drawn: Drawn) -> str:
    if drawn.condense:
        return f"Drawn with seed {drawn.seed}, and condensed: the teachers chose the first latents, and moved them for {drawn.condense} steps."
    cut = "no truncation" if drawn.truncation is None else f"latents cut at ± {drawn.truncation:g}"
    return f"Drawn with seed {drawn.seed}, {cut}."


def _figures(run: Path) -> str:
    """Return headline and table of the run's report, if it has one."""
    if not (run / REPORT).exists():
        return "Not measured: the set was drawn from a generator without a report beside it."
    try:
        shown = read_json(run / REPORT, lambda found: [view(found["results"]) for view in (headline, markdown_table)])
    except UserError as e:  # the set itself needs no report
        say(f"export: the card has no figures: {e}")
        return "Not shown: the report beside the generator is damaged."
    note = (
        "Accuracy on the real test set of students trained on fresh draws of this generator, not on this set itself; `fixed` rows "
        "of the same IPC are most similar to training on it."
    )
    return "\n\n".join([*shown, note])


def _provenance(made: Mapping[str, Any]) -> str:
    if not made:
        return "The generator's file has no provenance."
    lines = [f"- {name}: `{fp}`" for name, fp in made.get("fingerprints", {}).items() if name != "report"]
    lines += [f"- {name} {number}" for name, number in made.get("versions", {}).items()]
    lines += [f"- commit: `{made['commit']}`"] if made.get("commit") else []
    return "\n".join(lines + [f"- made: {made['created']}"] if made.get("created") else lines)


def sample_picture(generator: Sampler, drawn: Drawn) -> bytes:
    """Return a PNG with a row for each class (up to 20, evenly chosen), with images of the set if it has enough."""
    count = min(len(generator.classes), GRID_CLASSES)
    chosen = np.arange(count) * len(generator.classes) // count
    columns = max(1, min(GRID_COLUMNS, drawn.total // len(generator.classes)))
    most = min(drawn.total, columns * len(generator.classes))
    images, numbers = generator.balanced(most, drawn.seed, drawn.truncation)
    rows = [images[torch.from_numpy(np.flatnonzero(numbers == c)[:columns])] for c in chosen]
    return as_png(enlarged_grid(torch.cat([r for r in rows if len(r)]), columns))
