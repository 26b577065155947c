"""Diagnostics of the report besides its rows: confusion matrices, teacher logits, and whether the generator memorises.

Shapes: C classes, n images, k neighbours, D values per image.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gdd_dist.data.logit_cache import LogitCache
from gdd_dist.data.noise import permutation
from gdd_dist.evaluation.rows import Row
from gdd_dist.models.files import GENERATOR, load_generator_network, read_teachers
from gdd_dist.models.generator import ImageGenerator
from gdd_dist.training.classifier_fit import predict
from gdd_dist.training.context import Context
from gdd_dist.training.drawing import draw
from gdd_dist.training.losses import standardize

ANSWERS = 500
"""Number of images of each generator, and of real ones, whose teacher logits are shown."""
NEAR, NEIGHBOURS = 200, 3
FORWARDS = 4 * ANSWERS + NEAR
"""Number of images that ``collect`` forwards through a network."""
NEAR_SIDE = 32
"""Larger images are averaged down to this side before distances are computed."""
TRAIN_CHUNK, TRAIN_MOST = 1024, 100_000
CLOSE = 1.0
"""Percentile of held-out images' distances below which a generated image is close to a training image."""


@dataclass(frozen=True)
class Answers:
    """Standardized teacher logits: of the image's own class float32 [n], of the other classes float32 [n (C - 1)]."""

    own: np.ndarray
    others: np.ndarray


@dataclass(frozen=True)
class Near:
    """Nearest training images. Distances are root mean squares over pixels, in levels of 255.

    ``generated``, ``held_out``: distance to the nearest, float [n]. ``shown``: uint8 [m, 1 + k, H, W, C], a generated image and
    its k nearest, of the classes ``labels`` int64 [m, 1 + k].
    """

    generated: np.ndarray
    held_out: np.ndarray
    shown: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Evidence:
    """All diagnostics. ``matrices``: what a row trained on → confusion on test int64 [C, C], summed over seeds; ``row``: the matched row."""

    row: Row
    matrices: dict[str, np.ndarray]
    answers: dict[str, Answers]
    near: Near


def collect(ctx: Context, dirs: Mapping[str, Path], matrices: Mapping[Row, np.ndarray]) -> Evidence:
    """Compute the diagnostics on rank 0, after all students are trained. ``matrices``: by row."""
    row, chosen = first_group(matrices)
    generators = {
        kind: ctx.watch(load_generator_network(dirs[step] / GENERATOR)[0]).eval()
        for kind, step in (("gan", "gan"), ("matched", "matching"))
    }
    return Evidence(row, chosen, teacher_answers(ctx, dirs, generators), nearest_real(ctx, generators["matched"]))


def first_group(matrices: Mapping[Row, np.ndarray]) -> tuple[Row, dict[str, np.ndarray]]:
    """Return the first matched row, and the matrices of the rows with its student and budget: real, gan, matched."""
    first = next(r for r in matrices if r.train_on == "matched")
    return first, {r.train_on: m for r, m in matrices.items() if replace(r, train_on="matched") == first}


@torch.no_grad()
def teacher_answers(
    ctx: Context, dirs: Mapping[str, Path], generators: Mapping[str, ImageGenerator]
) -> dict[str, Answers]:
    """Return the logits of the best last teacher on real images (cached), the GAN's and the matched ones, of the same classes."""
    best = max((t for t in read_teachers(dirs["teachers"]) if t.last), key=lambda t: t.val_accuracy)
    images, seed = ctx.images("train"), ctx.config.step_seed("report")
    order = permutation(seed, "report/answers", 0, len(images))
    samples = order[np.arange(ANSWERS) % len(order)]
    labels = images.labels[samples]
    cache = LogitCache(dirs["logits"], images.shards.shard_samples)
    found = {"real": split_answers(cache.take(best.index, samples, np.zeros(ANSWERS, np.int64)), labels)}
    net = ctx.teacher(best)
    for kind, generator in generators.items():
        drawn = draw(ctx, generator, labels, seed, "report/answers", 0)
        answers = predict(net, drawn.__getitem__, len(drawn), ctx.device, ctx.precision)
        found[kind] = split_answers(answers.numpy(), labels)
    return found


def split_answers(logits: np.ndarray, labels: np.ndarray) -> Answers:
    """Split standardized logits float32 [n, C] into those of the own class and of the others."""
    values = standardize(torch.from_numpy(logits)).numpy()
    own = np.zeros(values.shape, dtype=bool)
    own[np.arange(len(labels)), labels] = True
    return Answers(values[own], values[~own])


def nearest_real(ctx: Context, generator: ImageGenerator) -> Near:
    """Compare distances to training images: of random samples, and of held-out real images (val)."""
    train, val, seed = ctx.images("train"), ctx.images("val"), ctx.config.step_seed("report")
    labels = np.arange(NEAR) % ctx.classes
    drawn = draw(ctx, generator, labels, seed, "report/near", 0)
    rows = permutation(seed, "report/near/val", 0, len(val))[:NEAR]
    compared = min(len(train), TRAIN_MOST)
    picked = np.arange(compared) * len(train) // compared  # evenly spread
    queries = torch.cat([flat(drawn.cpu(), ctx.device), flat(val.read(rows), ctx.device)])

    monitor = ctx.passing("report: nearest neighbours", len(picked), unit="image")

    def chunks() -> Iterator[Tensor]:
        for i in range(0, len(picked), TRAIN_CHUNK):
            yield flat(train.read(picked[i : i + TRAIN_CHUNK]), ctx.device)
            monitor.advance(min(i + TRAIN_CHUNK, len(picked)))
        monitor.close()

    distances, places = nearest(queries, chunks(), min(NEIGHBOURS, len(picked)))
    shown = permutation(seed, "report/near/shown", 0, NEAR)[: min(ctx.classes, 10)]
    found = picked[places[shown]]
    pictures = [
        torch.cat([drawn[int(i)][None].cpu(), train.read(near).cpu()]).permute(0, 2, 3, 1).numpy()
        for i, near in zip(shown, found, strict=True)
    ]
    classes = np.column_stack([labels[shown], train.labels[found]])
    return Near(distances[:NEAR, 0], distances[NEAR:, 0], np.stack(pictures), classes)


def flat(images: Tensor, device: torch.device) -> Tensor:
    """Convert uint8 [n, C, H, W] to float32 [n, D] in ± 127.5; sides above NEAR_SIDE are averaged down to it."""
    x = images.to(device).float() - 127.5
    if x.shape[-1] > NEAR_SIDE:
        x = F.interpolate(x, size=(NEAR_SIDE, NEAR_SIDE), mode="area")
    return x.flatten(1).contiguous()


@torch.no_grad()
def nearest(queries: Tensor, chunks: Iterator[Tensor], k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (distance, index) of the k nearest of all chunks' rows, each [n, k], nearest first; distance: root mean square.

    Computed by matrix products, always in float32 (TF32 is too coarse to find copies), exact to about a tenth of a level of 255
    (for which pixels are centred).
    """
    allowed = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        return _nearest(queries, chunks, k)
    finally:
        torch.set_float32_matmul_precision(allowed)


def _nearest(queries: Tensor, chunks: Iterator[Tensor], k: int) -> tuple[np.ndarray, np.ndarray]:
    best = torch.full((len(queries), 0), 0.0, device=queries.device)
    places = torch.zeros((len(queries), 0), dtype=torch.int64, device=queries.device)
    first = 0
    for chunk in chunks:
        distance = torch.cdist(queries, chunk, compute_mode="use_mm_for_euclid_dist")
        here = torch.arange(first, first + len(chunk), device=queries.device).expand(len(queries), -1)
        best, order = torch.cat([best, distance], 1).topk(min(k, best.shape[1] + len(chunk)), largest=False)
        places = torch.cat([places, here], 1).gather(1, order)
        first += len(chunk)
    return (best / queries.shape[1] ** 0.5).cpu().numpy(), places.cpu().numpy()


def summary(near: Near) -> dict[str, float]:
    """Return the entries of metrics.json: median distances in levels of 255, and the percentage of generated images that are closer to
    a training image than the closest CLOSE percent of held-out ones.
    """
    close = near.generated < np.percentile(near.held_out, CLOSE)
    return {
        "median_generated": float(np.median(near.generated)),
        "median_held_out": float(np.median(near.held_out)),
        "close_share": 100.0 * float(close.mean()),
    }


def extremes(change: np.ndarray, most: int) -> Sequence[int]:
    """Return classes sorted by ``change``, [C]: all, or the lowest and the highest if there are more than ``most``."""
    order = np.argsort(np.nan_to_num(change), kind="stable").tolist()
    half = most // 2
    chosen: Sequence[int] = order if len(order) <= most else [*order[:half], *order[-half:]]
    return chosen
