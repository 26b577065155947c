"""Fits the trivial generator: principal components of all images, then mean and covariance of each class in them.

Sums over images are exact: pixels are integers, axes and coordinates are rounded to a grid, and all products and sums are
integers that fit in float64 or int64. So they do not depend on the order of images, ranks, threads or the matrix library.
Only the factorisations do, so one rank computes them on one thread and sends them to all.

Shapes: N images, C classes, D pixels, L axes, K components. Pixels are uint8 - 128 until `Gaussians` has them in [-1, 1].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gdd_dist.data.noise import normal
from gdd_dist.models.gaussian import LinearGenerator, lower, pack, unpack
from gdd_dist.storage.json_files import read_json

MOST = 256
"""Most components. On CIFAR-10, 384 gave students 0.6 points more on val in a file 1.7 times as large (benchmarks/gaussian.py)."""
SPARE = 32
"""Extra axes, which make the last components of a random sketch accurate (Halko et al. 2011)."""
ROWS = 256
"""Images converted to float64 at once: 25 MB at 64 x 64 x 3."""
GRID = 2.0**30
"""Axes are multiples of 1 / GRID: with 8-bit pixels a coordinate has less than 53 bits up to D = 2^32."""
BITS = 20
"""Bits of a coordinate: a sum of products of two over 4,096 images has 52 bits."""
RIDGE, FLOOR = 1e-6, 1e-12
"""Added to each variance, so that constant directions have a root, too: a share of the mean variance, and an absolute value."""

CHOICE = "choice.json"
"""File in the finished step's directory with every candidate and its measurement."""

Read = Callable[[int], tuple[Tensor, Tensor]]
"""``read(part)`` returns the part's images, uint8 [n, channels, size, size], and labels, int64 [n]. Any partition is allowed."""
Add = Callable[[Tensor], Tensor]
"""``add(tensor)`` returns the sum of a contiguous int64 tensor over ranks, all of which call it; with one rank, the tensor itself."""


@dataclass(frozen=True)
class Moments:
    """Exact sums over images, by class, of coordinates z on ``axes``, in units of 1/``scale`` pixel steps.

    axes float64 [D, L], mean float64 [D] (pixels - 128), count int64 [C]; sums int64: first Σ z [C, L], second Σ z zᵀ
    [C, L(L+1)/2] packed, third Σ ‖z‖² z / 2^20 [C, L], fourth Σ ‖z‖⁴ / 2^40 [C].
    """

    axes: Tensor
    mean: Tensor
    scale: float
    count: Tensor
    first: Tensor
    second: Tensor
    third: Tensor
    fourth: Tensor


def most_components(images: int, classes: int, pixels: int) -> int:
    """Return the most components for N images in C classes: min(256, D, N - C), at least 1."""
    return max(1, min(MOST, pixels, images - classes))


def moments(
    read: Read,
    parts: Iterable[int],
    *,
    pixels: int,
    classes: int,
    components: int,
    seed: int = 0,
    sketches: int = 1,
    add: Add = lambda tensor: tensor,
    lead: bool = True,
) -> Moments:
    """Read this rank's ``parts`` ``sketches`` + 1 times (two or more): sketches of the components, then the classes' moments.

    ``add`` sums over ranks; exactly one rank is the ``lead``. All ranks get the same result. With one sketch, 256 components
    have 99.1 % of the variance of the best 256 (CIFAR-10), with two sketches 99.8 %, with three 99.9 %.
    """
    parts = list(parts)
    width = min(components + SPARE, pixels)
    axes = _given(_random_axes(pixels, width, seed) if lead else None, (pixels, width), add)
    for _ in range(sketches):
        count, total, spread = _sketch(read, parts, axes, add)
        axes = _given(_orthonormal(spread) if lead else None, (pixels, width), add)
    return _class_moments(read, parts, axes, total.double() / count, classes, add)


def _random_axes(pixels: int, width: int, seed: int) -> Tensor:
    axes = torch.empty(pixels, width, dtype=torch.float64)
    for some in torch.arange(pixels).split(ROWS):  # in parts, because drawing a number takes many times its own memory
        axes[some] = torch.from_numpy(normal(seed, "gaussian/axes", 0, some.numpy(), width)).double()
    return axes.div_(axes.norm(dim=0))


def _given(axes: Tensor | None, shape: tuple[int, int], add: Add) -> Tensor:
    """Return the lead's axes, rounded to the grid, on all ranks."""
    mine = torch.zeros(shape, dtype=torch.int64) if axes is None else (axes * GRID).round().long().contiguous()
    return add(mine).double() / GRID


def _scale(pixels: int) -> float:
    """Return the power of two by which coordinates on an axis of length 1 (at most 128 √D) are scaled to `BITS` bits."""
    return 2.0 ** (BITS - 7 - math.ceil(math.log2(pixels) / 2))


def _coordinates(images: Tensor, axes: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield pixels float64 [n, D] and coordinates float64 [n, L], both integers, of at most `ROWS` images at a time."""
    for block in images.split(ROWS):
        x = block.flatten(1).cpu().double().sub_(128)
        yield x, (x @ axes).mul_(_scale(axes.shape[0])).round_()


def _sketch(read: Read, parts: list[int], axes: Tensor, add: Add) -> tuple[int, Tensor, Tensor]:
    """Return (N, Σ x int64 [D], N · covariance · axes float64 [D, L]); this needs no matrix [D, D]."""
    count, total = torch.zeros(1, dtype=torch.int64), torch.zeros(len(axes), dtype=torch.int64)
    first, product = torch.zeros(axes.shape[1], dtype=torch.int64), torch.zeros(axes.shape, dtype=torch.int64)
    for part in parts:
        for x, z in _coordinates(read(part)[0], axes):
            count += len(x)
            total += x.sum(0).long()
            first += z.sum(0).long()
            product += (x.T @ z).long()
    count, total, first, product = map(add, (count, total, first, product))
    mean = total.double() / count
    return int(count), total, product.double().sub_(torch.outer(mean, first.double()))


def _class_moments(read: Read, parts: list[int], axes: Tensor, mean: Tensor, classes: int, add: Add) -> Moments:
    width = axes.shape[1]
    places = lower(width)
    count, fourth = torch.zeros(2, classes, dtype=torch.int64)
    first, third = torch.zeros(2, classes, width, dtype=torch.int64)
    second = torch.zeros(classes, len(places), dtype=torch.int64)
    for part in parts:
        images, labels = read(part)
        labels = labels.cpu()
        z = torch.cat([z for _, z in _coordinates(images, axes)])
        square = z.square().sum(1)
        count += labels.bincount(minlength=classes)
        first.index_add_(0, labels, z.long())
        third.index_add_(0, labels, (square[:, None] * z).mul_(2.0**-BITS).round_().long())
        fourth.index_add_(0, labels, square.square().mul_(4.0**-BITS).round_().long())
        for y in labels.unique().tolist():
            for rows in z[labels == y].split(4096):
                second[y] += pack(rows.T @ rows, places).long()
    return Moments(axes, mean, _scale(len(axes)), *map(add, (count, first, second, third, fourth)))


@contextmanager
def one_thread() -> Iterator[None]:
    """Use one thread, because the number of threads changes the last bits of a factorisation."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@one_thread()
def _orthonormal(columns: Tensor) -> Tensor:
    return torch.linalg.qr(columns).Q


class Gaussians:
    """Means and covariances of classes in principal components; ``generator`` makes generators of any K ≤ L from them.

    Coordinates are in [-1, 1] pixels, from the mean of all images, components by falling variance. Attributes: count [C],
    variance [L] of all images, means [C, L], pooled covariance within classes [L, L], alpha [C] (`ledoit_wolf`).
    ``alpha`` is computed from all L axes for every K, because the last axes hardly influence it.
    """

    @one_thread()
    def __init__(self, sums: Moments) -> None:
        self._sums, self._places = sums, lower(sums.axes.shape[1])
        self.count = sums.count
        n, images = self.count.clamp(min=1).double(), int(self.count.sum())
        centre = sums.first.sum(0).double() / images
        whole = self._square(sums.second.sum(0)) / images - torch.outer(centre, centre)
        variance, rotation = torch.linalg.eigh(whole)
        rotation = rotation.flip(1)
        basis = sums.axes @ rotation
        # The sign of an eigenvector is arbitrary; here its largest entry is positive.
        sign = basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign()
        step = 1 / (127.5 * sums.scale)
        self._basis, self._rotation = basis * sign, rotation * sign * step
        self.variance = variance.flip(0) * step**2
        self._raw_means = sums.first.double() / n[:, None]
        self.means = (self._raw_means - centre) @ self._rotation * (self.count > 0)[:, None]
        free = max(1, images - int((self.count > 0).sum()))
        self.pooled = sum((self._scatter(y) for y in range(len(n))), torch.zeros_like(whole)) / free
        self.alpha = torch.tensor([self._alpha(y) for y in range(len(n))], dtype=torch.float64)

    def _square(self, packed: Tensor) -> Tensor:
        triangle = unpack(packed.double(), self._places, self._sums.axes.shape[1])
        return triangle + triangle.tril(-1).T

    def _scatter(self, y: int) -> Tensor:
        """Return Σ (z - mean) (z - mean)ᵀ of a class, [L, L]."""
        mean = self._raw_means[y]
        raw = self._square(self._sums.second[y]) - int(self.count[y]) * torch.outer(mean, mean)
        return self._rotation.T @ raw @ self._rotation

    def covariance(self, y: int) -> Tensor:
        """Return the unbiased covariance of a class, [L, L]; zero for a single image."""
        return self._scatter(y) / max(1, int(self.count[y]) - 1)

    def _fourth(self, y: int) -> float:
        """Return Σ ‖z - mean‖⁴ of a class, from moments about the origin of the axes."""
        s, m, n = self._sums, self._raw_means[y], float(self.count[y])
        second, unit = self._square(s.second[y]), 2.0**BITS
        of_mean = m @ m
        terms = (
            s.fourth[y].double() * unit**2
            - 4 * unit * s.third[y].double() @ m
            + 4 * m @ second @ m
            + 2 * second.trace() * of_mean
            - 3 * n * of_mean**2
        )
        return float(terms) / (127.5 * s.scale) ** 4

    def _alpha(self, y: int) -> float:
        n, images = int(self.count[y]), int(self.count.sum())
        return ledoit_wolf(self._fourth(y), n, self.covariance(y), self.pooled, n / images)

    @one_thread()
    def generator(
        self,
        components: int,
        *,
        channels: int,
        size: int,
        spread: float = 1.0,
        alpha: float | None = None,
        shrink_means: bool = True,
        dtype: str = "float32",
    ) -> LinearGenerator:
        """Return the generator of the first K components. ``alpha``: one value for all classes instead of Ledoit and Wolf's."""
        k, classes = components, len(self.count)
        net = LinearGenerator(classes=classes, channels=channels, size=size, latent=k, spread=spread, dtype=dtype)
        net.mean.copy_((self._sums.mean + 0.5) / 127.5)
        net.basis.copy_(self._basis[:, :k].T)
        means, pooled = self.means[:, :k], self.pooled[:k, :k]
        net.class_means.copy_(shrunk_means(means, self.count, float(pooled.trace())) if shrink_means else means)
        ridge = (RIDGE * pooled.diagonal().mean() + FLOOR) * torch.eye(k, dtype=torch.float64)
        places = lower(k)
        for y in range(classes):
            a = float(self.alpha[y]) if alpha is None else alpha
            mixed = (1 - a) * self.covariance(y)[:k, :k] + a * pooled + ridge
            net.roots[y] = pack(torch.linalg.cholesky(mixed), places)
        return net


def ledoit_wolf(fourth: float, count: int, covariance: Tensor, target: Tensor, share: float = 0.0) -> float:
    """Return the α in [0, 1] for which (1 - α) covariance + α target has the least expected error in Frobenius norm.

    α = (1 - share) π / ((n - 2) ‖S - T‖²), π = (n / (n - 1))² (Σ ‖z‖⁴ / n - ‖S (n - 1) / n‖²): Ledoit and Wolf, "Improved estimation
    of the covariance matrix of stock returns" (2003), for a target T that is itself a mean of such covariances, in which
    this class has weight ``share``. They divide by n. With n - 2, α is 1 if all deviations from the class mean are
    orthogonal, so that S is only noise; it is also 1 for one or two images. ``fourth``: Σ ‖z‖⁴ of the deviations.
    """
    if count < 3:
        return 1.0
    n = float(count)
    noise = fourth / n * (n / (n - 1)) ** 2 - float(covariance.square().sum())
    apart = float((covariance - target).square().sum())
    return min(1.0, max(0.0, (1 - share) * noise / ((n - 2) * apart))) if apart > 0 else 1.0


def shrunk_means(means: Tensor, count: Tensor, variance: float) -> Tensor:
    """Return class means [C, K], relative to the mean of all, shrunk towards it by their share of noise.

    A class keeps B / (B + variance / n_c), B = max(0, Σ ‖mean_c‖² / (C - 1) - mean of variance / n_c): the James-Stein
    estimator as empirical Bayes for classes of unequal size (Efron and Morris, "Stein's estimation rule and its competitors",
    1973). ``variance``: the trace of the pooled covariance within classes. A class without images gets the mean of all.
    """
    there = count > 0
    noise = variance / count.clamp(min=1).double()
    between = float(means[there].square().sum()) / max(1, int(there.sum()) - 1) - float(noise[there].mean())
    kept = max(0.0, between) / (max(0.0, between) + noise)
    return means * (kept.nan_to_num(0.0) * there)[:, None]


def chosen(directory: Path) -> dict[str, Any]:
    """Return the candidate that the finished step ``gaussian`` in ``directory`` kept, with its measurement on val."""
    return read_json(directory / CHOICE, lambda document: best_of(document["candidates"]))


def best_of(candidates: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the candidate to keep: the first one with the best val accuracy."""
    return max(candidates, key=lambda c: c["val"])
