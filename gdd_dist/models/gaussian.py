"""The trivial generator: one Gaussian per class in principal components that all classes share. Nothing in it is trained.

Shapes: B batch, K latent, D = channels · size², pixels in [-1, 1].
"""

from collections.abc import Callable

import torch
from torch import Tensor

from gdd_dist.models.files import arguments
from gdd_dist.models.generator import ImageGenerator

CLASSES_AT_ONCE = 64
"""Classes whose roots are unpacked together on a GPU: 17 MB for 256 latents, and as much again for each 256 rows."""
ByClass = Callable[[slice], Tensor]
"""Consecutive classes → their matrices [n, K, K]."""
ByMatrix = Callable[[Tensor, Tensor], Tensor]
"""Matrices [..., K, K] and rows [B, K] → the result of each matrix for each row, [..., B, K]."""


class LinearGenerator(ImageGenerator):
    """Draws images: latents [B, latent], labels [B] int64 -> [B, channels, size, size] float32 in [-1, 1].

    image = mean + (class_means[y] + spread · root[y] z) basis, clamped. All of it is buffers, zero until load_state_dict:
    mean [D], basis [K, D] with orthonormal rows, class_means [classes, K], roots [classes, K(K+1)/2], the lower triangles
    whose squares are the covariances. ``dtype``, float32 or float16, is how basis and roots are stored; float32 is what
    computes, whatever autocast says, since it alone keeps the small components.
    """

    mean: Tensor
    basis: Tensor
    class_means: Tensor
    roots: Tensor
    places: Tensor

    def __init__(
        self, *, classes: int, channels: int, size: int, latent: int, spread: float = 1.0, dtype: str = "float32"
    ) -> None:
        arch = arguments(locals())
        super().__init__(arch, arch)
        pixels, stored = channels * size**2, {"float32": torch.float32, "float16": torch.float16}[dtype]
        self.register_buffer("mean", torch.zeros(pixels))
        self.register_buffer("basis", torch.zeros(latent, pixels, dtype=stored))
        self.register_buffer("class_means", torch.zeros(classes, latent))
        self.register_buffer("roots", torch.zeros(classes, latent * (latent + 1) // 2, dtype=stored))
        self.register_buffer("places", lower(latent), persistent=False)

    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:
        """Images [B, channels, size, size] in [-1, 1] of latents [B, latent] (standard normal) and labels [B] int64."""
        return self.linear(latents, labels).clamp(-1, 1)

    def linear(self, latents: Tensor, labels: Tensor) -> Tensor:
        """Return the images before the clamp."""
        channels, size = self.channels, self.size
        with torch.autocast(latents.device.type, enabled=False):
            scaled = by_class(latents.float(), labels, self.classes, self._roots, lambda root, z: z @ root.mT)
            codes = self.class_means[labels] + self.arch["spread"] * scaled
            return torch.addmm(self.mean, codes, self.basis.float()).view(-1, channels, size, size)

    def latents(self, images: Tensor, labels: Tensor) -> Tensor:
        """Latents [B, latent] from which ``linear`` draws the projection of images [B, channels, size, size] on the components."""
        with torch.autocast(images.device.type, enabled=False):
            codes = (images.float().flatten(1) - self.mean) @ self.basis.float().T - self.class_means[labels]

            def solve(root: Tensor, code: Tensor) -> Tensor:
                return torch.linalg.solve_triangular(root.mT, code, upper=True, left=False)

            return by_class(codes, labels, self.classes, self._roots, solve) / self.arch["spread"]

    def root(self, y: int) -> Tensor:
        """Return the root of class ``y``'s covariance, the spread included: lower triangular, float64 [K, K] on the CPU."""
        return self.arch["spread"] * unpack(self.roots[y].cpu().double(), self.places.cpu(), self.latent)

    def with_classes(self, means: Tensor, roots: Tensor) -> "LinearGenerator":
        """Return a generator with these class means [classes, K] and packed roots [classes, K(K+1)/2], in which the spread is contained."""
        other = LinearGenerator(**{**self.arch, "spread": 1.0})
        other.load_state_dict({**self.state_dict(), "class_means": means, "roots": roots})
        return other

    def _roots(self, part: slice) -> Tensor:
        """Return the lower triangular roots of the classes ``part``, float32 [n, K, K]."""
        return unpack(self.roots[part].float(), self.places, self.latent)


def by_class(rows: Tensor, labels: Tensor, classes: int, matrices: ByClass, function: ByMatrix) -> Tensor:
    """Return ``function`` of each row and the matrix of its class, in the order of ``rows`` [B, K]."""
    # Sorting saves work, and the host must know how many rows each class has: it would wait for a GPU to say so.
    return (_sorted if rows.device.type == "cpu" else _chosen)(rows, labels, classes, matrices, function)


def _sorted(rows: Tensor, labels: Tensor, classes: int, matrices: ByClass, function: ByMatrix) -> Tensor:
    """Make each matrix once, and apply it only to the rows of its class."""
    order = labels.argsort()
    counts = labels.bincount(minlength=classes).tolist()
    parts = [
        function(matrices(slice(y, y + 1))[0], rows[here]) for y, here in enumerate(order.split(counts)) if counts[y]
    ]
    return torch.cat(parts)[order.argsort()] if parts else rows


def _chosen(rows: Tensor, labels: Tensor, classes: int, matrices: ByClass, function: ByMatrix) -> Tensor:
    """Apply each matrix to all rows, and take the results of its class: this needs no value on the host."""
    found, slots = torch.zeros_like(rows), torch.arange(len(rows), device=rows.device)
    for first in range(0, classes, CLASSES_AT_ONCE):
        several = matrices(slice(first, first + CLASSES_AT_ONCE))
        place = labels - first
        here = (place >= 0) & (place < len(several))
        answers = function(several, rows)[place.clamp(0, len(several) - 1), slots]
        found = torch.where(here[:, None], answers, found)
    return found


def lower(side: int) -> Tensor:
    """Where the lower triangle of a matrix [side, side] lies in its flat form, row after row: int64 [side(side+1)/2]."""
    rows, columns = torch.tril_indices(side, side)
    return rows * side + columns


def pack(matrix: Tensor, places: Tensor) -> Tensor:
    """The lower triangle [K(K+1)/2] of [K, K]; ``places`` of ``lower``."""
    return matrix.flatten()[places]


def unpack(packed: Tensor, places: Tensor, side: int) -> Tensor:
    """The lower triangular matrices [..., side, side] of ``pack``, of [..., K(K+1)/2]."""
    flat = packed.new_zeros(*packed.shape[:-1], side * side).index_copy_(-1, places, packed)
    return flat.unflatten(-1, (side, side))
