"""Fits the trivial generator: principal components of all images, then mean and covariance of each class in them.

Sums over images are exact: pixels are integers, axes and coordinates are rounded to a grid, and all products and sums are
integers that float64 or int64 hold. So they depend neither on the order of images nor on ranks, threads or matrix library;
only the factorisations do, which one rank makes on one thread and gives to all.

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
"""Components at most. On CIFAR-10, 384 gave students 0.6 points more on val in a file 1.7 times as large (benchmarks/gaussian.py)."""
SPARE = 32
"""Axes beyond the components, which make the last components of a random sketch good (Halko et al. 2011)."""
ROWS = 256
"""Images converted to float64 at once: 25 MB at 64 x 64 x 3."""
GRID = 2.0**30
"""Axes are multiples of its inverse: with 8-bit pixels a coordinate has less than 53 bits up to D = 2^32."""
BITS = 20
"""Of a coordinate: a product of two, summed over 4,096 images, has 52."""
RIDGE, FLOOR = 1e-6, 1e-12
"""Of the mean variance, and of pixels in [-1, 1]: added to each variance, so that what does not vary has a root too."""

CHOICE = "choice.json"
"""In the directory of the finished step: every candidate with its measurement."""

Read = Callable[[int], tuple[Tensor, Tensor]]
"""``read(part)``: the part's images, uint8 [n, channels, size, size], and labels, int64 [n]. Parts are any cut of the images."""
Add = Callable[[Tensor], Tensor]
"""``add(tensor)``: the sum of a contiguous int64 tensor over ranks, which all of them call; the tensor itself where there is one rank."""


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
    """The most components that N images in C classes give: min(256, D, N - C), at least 1."""
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

    ``add`` sums over ranks; exactly one rank is the ``lead``. All ranks get the same answer. With one sketch 256 components
    hold 99.1 % of the variance that the best 256 hold (CIFAR-10), with two 99.8, with three 99.9.
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
    for some in torch.arange(pixels).split(ROWS):  # to draw a number takes many times its own memory
        axes[some] = torch.from_numpy(normal(seed, "gaussian/axes", 0, some.numpy(), width)).double()
    return axes.div_(axes.norm(dim=0))


def _given(axes: Tensor | None, shape: tuple[int, int], add: Add) -> Tensor:
    """The lead's axes, rounded to the grid, on all ranks."""
    mine = torch.zeros(shape, dtype=torch.int64) if axes is None else (axes * GRID).round().long().contiguous()
    return add(mine).double() / GRID


def _scale(pixels: int) -> float:
    """A power of two with which a coordinate on an axis of length 1, at most 128 √D, has `BITS` bits."""
    return 2.0 ** (BITS - 7 - math.ceil(math.log2(pixels) / 2))


def _coordinates(images: Tensor, axes: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Pixels float64 [n, D] and coordinates float64 [n, L], both integers, of at most `ROWS` images at a time."""
    for block in images.split(ROWS):
        x = block.flatten(1).cpu().double().sub_(128)
        yield x, (x @ axes).mul_(_scale(axes.shape[0])).round_()


def _sketch(read: Read, parts: list[int], axes: Tensor, add: Add) -> tuple[int, Tensor, Tensor]:
    """(N, Σ x int64 [D], N · covariance · axes float64 [D, L]): the sketch needs no matrix [D, D]."""
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
    """How a factorisation is cut for threads moves its last bits."""
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
    """Means and covariances of classes in principal components, from which ``generator`` makes generators of any K ≤ L.

    Coordinates are in [-1, 1] pixels, from the mean of all images, components by falling variance. Attributes: count [C],
    variance [L] of all images, means [C, L], pooled covariance within classes [L, L], alpha [C] (`ledoit_wolf`).
    ``alpha`` comes from all L axes, whatever K is: the last of them have next to no part in it.
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
        # An eigenvector's sign is the library's whim: its largest entry shall be positive.
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
        """Σ (z - mean) (z - mean)ᵀ of a class, [L, L]."""
        mean = self._raw_means[y]
        raw = self._square(self._sums.second[y]) - int(self.count[y]) * torch.outer(mean, mean)
        return self._rotation.T @ raw @ self._rotation

    def covariance(self, y: int) -> Tensor:
        """The class's own, unbiased, [L, L]; zero for a single image."""
        return self._scatter(y) / max(1, int(self.count[y]) - 1)

    def _fourth(self, y: int) -> float:
        """Σ ‖z - mean‖⁴ of a class, from moments about the origin of the axes."""
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
        """The generator of the first K components. ``alpha``: one for all classes instead of Ledoit and Wolf's."""
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
    """The α in [0, 1] for which (1 - α) covariance + α target is expected nearest to the truth, in Frobenius norm.

    α = (1 - share) π / ((n - 2) ‖S - T‖²), π = (n / (n - 1))² (Σ ‖z‖⁴ / n - ‖S (n - 1) / n‖²): Ledoit and Wolf, "Improved estimation
    of the covariance matrix of stock returns" (2003), for a target T that is itself a mean of such covariances, in which
    this class has weight ``share``. They divide by n. With n - 2, α is 1 where deviations from the class mean are all
    orthogonal, so that S is nothing but noise; it is also 1 for one or two images. ``fourth``: Σ ‖z‖⁴ of the deviations.
    """
    if count < 3:
        return 1.0
    n = float(count)
    noise = fourth / n * (n / (n - 1)) ** 2 - float(covariance.square().sum())
    apart = float((covariance - target).square().sum())
    return min(1.0, max(0.0, (1 - share) * noise / ((n - 2) * apart))) if apart > 0 else 1.0


def shrunk_means(means: Tensor, count: Tensor, variance: float) -> Tensor:
    """Class means [C, K], taken from the mean of all, moved towards it by how much of them is noise.

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
    """Of the finished step ``gaussian`` in ``directory``: the candidate that it kept, with its measurement on val."""
    return best_of(read_json(directory / CHOICE)["candidates"])


def best_of(candidates: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The candidate that is kept: the first that is best on val."""
    return max(candidates, key=lambda c: c["val"])
