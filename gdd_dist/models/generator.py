"""The class-conditional generator: R3GAN's residual design (Huang et al. 2024), scaled down to small budgets.

There is no normalisation layer, so an image depends only on its own latent and label. Shapes: B batch, C image channels.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gdd_dist.models.files import arguments
from gdd_dist.models.residual import ResidualStage, scaled_conv, side_widths


class ImageGenerator(nn.Module):
    """The base of all generators: latents [B, latent] float, labels [B] int64 -> [B, channels, size, size] float in [-1, 1].

    ``arch``: JSON-compatible arguments that rebuild it: ``type(net)(**net.arch)``; ``shape``: latent, classes, channels, size.
    """

    def __init__(self, arch: dict[str, Any], shape: Mapping[str, int]) -> None:
        super().__init__()
        self.arch = arch
        self.latent, self.classes = shape["latent"], shape["classes"]
        self.channels, self.size = shape["channels"], shape["size"]


class Generator(ImageGenerator):
    """Draws images: latents [B, latent] float, labels [B] int64 -> [B, C, size, size] float in [-1, 1].

    A learned basis of 4x4 (up to 7x7) is modulated by a linear map of latent and class embedding; each doubling of the side
    has `blocks` residual blocks. `width` is the number of channels up to 16 x 16 positions; above, it halves with each
    doubling. The last layer outputs `patch` x `patch` pixels at each position: patch 2 leaves out the most expensive
    resolution, which suits smooth images. Raises UserError for a size that is not `patch` times 4, 5, 6 or 7 times a power of
    two.
    """

    def __init__(
        self,
        *,
        classes: int,
        channels: int,
        size: int,
        latent: int = 64,
        width: int = 64,
        blocks: int = 1,
        embedding: int = 64,
        group_size: int = 16,
        expansion: int = 2,
        patch: int = 1,
    ) -> None:
        arch = arguments(locals())
        super().__init__(arch, arch)
        by_side = side_widths(size, width, patch)
        base, widths = min(by_side), list(by_side.values())
        depth = blocks * len(widths)
        self.embedding = nn.Embedding(classes, embedding)
        self.modulation = nn.Linear(latent + embedding, widths[0], bias=False)
        nn.init.normal_(self.modulation.weight, std=(latent + embedding) ** -0.5)
        self.basis = nn.Parameter(torch.randn(widths[0], base, base))
        self.stages = nn.ModuleList(ResidualStage(w, blocks, depth, group_size, expansion) for w in widths)
        pairs = zip(widths[:-1], widths[1:], strict=True)
        self.changes = nn.ModuleList(scaled_conv(a, b, 1) if a != b else nn.Identity() for a, b in pairs)
        self.to_image = scaled_conv(widths[-1], channels * patch**2, 1, bias=True)

    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:
        """Images [B, C, size, size] in [-1, 1] of latents [B, latent] (standard normal) and labels [B] int64."""
        scale = self.modulation(torch.cat((latents, self.embedding(labels)), 1))
        x = self.basis * scale[:, :, None, None]
        for level, stage in enumerate(self.stages):
            if level:
                x = doubled(self.changes[level - 1](x))
            x = stage(x)
        return torch.tanh(F.pixel_shuffle(self.to_image(x), self.arch["patch"]))


def doubled(x: Tensor) -> Tensor:
    """Bilinear, [B, C, S, S] -> [B, C, 2S, 2S]: F.interpolate's result, as products with one matrix on both sides.

    This is faster on a CPU. On a GPU its backward pass needs no atomic additions, whose order differs between runs.
    """
    unit = torch.eye(x.shape[-1], device=x.device)[None]
    matrix = F.interpolate(unit, scale_factor=2, mode="linear", align_corners=False)[0].to(x.dtype)
    return matrix.T @ (x @ matrix)
