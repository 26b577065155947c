"""A generator that starts as the trivial one: linear image + residual, and the residual is zero at first.

The residual network gets the linear image and its own noise. It gets neither the linear latent nor the class, because it could
use them to encode the class as a pattern in the image (docs/method.md, "The shortcut").
Shapes: B batch, K latent of the linear part, E dimension of the residual's noise, C image channels.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from gdd_dist.models.files import arguments
from gdd_dist.models.gaussian import LinearGenerator
from gdd_dist.models.generator import Generator, ImageGenerator, doubled
from gdd_dist.models.residual import ResidualStage, scaled_conv, side_widths


class ResidualGenerator(ImageGenerator):
    """Latents [B, K + E] float, labels [B] int64 -> [B, C, size, size] float in [-1, 1].

    ``linear``: the arguments of the linear part, whose weights are buffers and never trained. ``noise`` is E. The residual is a
    U-Net of R3GAN's blocks on patches of ``patch`` pixels: down to a side of 4 to 7, where the noise is added, and up again, with
    the features of the downward path added. The clamp to [-1, 1] is ignored in the backward pass (straight-through).
    """

    def __init__(
        self,
        *,
        linear: dict[str, Any],
        noise: int = 64,
        width: int = 64,
        blocks: int = 1,
        group_size: int = 16,
        expansion: int = 2,
        patch: int = 1,
    ) -> None:
        arch = arguments(locals())
        super().__init__(arch, {**linear, "latent": linear["latent"] + noise})
        self.linear = LinearGenerator(**linear)
        by_side = side_widths(linear["size"], width, patch)
        pixels, base, widths = linear["channels"] * patch**2, min(by_side), list(by_side.values())
        depth = 2 * blocks * len(widths)

        def stages() -> nn.ModuleList:
            return nn.ModuleList(ResidualStage(w, blocks, depth, group_size, expansion) for w in widths)

        self.from_image = scaled_conv(pixels, widths[-1], 1)
        self.down, self.up = stages(), stages()
        pairs = list(zip(widths[:-1], widths[1:], strict=True))
        self.narrow = nn.ModuleList(scaled_conv(b, a, 1) if a != b else nn.Identity() for a, b in pairs)
        self.widen = nn.ModuleList(scaled_conv(a, b, 1) if a != b else nn.Identity() for a, b in pairs)
        self.noise = nn.Linear(noise, widths[0] * base**2, bias=False)
        nn.init.normal_(self.noise.weight, std=noise**-0.5)
        self.to_image = scaled_conv(widths[-1], pixels, 1, gain=0.0, bias=True)

    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:
        """Images [B, C, size, size] in [-1, 1] of latents [B, K + E] (standard normal) and labels [B] int64."""
        z, noise = latents.split([self.linear.latent, self.arch["noise"]], 1)
        image = self.linear.linear(z, labels)
        image = image + self._residual(image.clamp(-1, 1), noise).float()
        return image + (image.clamp(-1, 1) - image).detach()

    def _residual(self, image: Tensor, noise: Tensor) -> Tensor:
        """Return the residual for linear images [B, C, size, size] and noise [B, E]."""
        x = self.from_image(F.pixel_unshuffle(image, self.arch["patch"]))
        passed = []
        for level in reversed(range(len(self.down))):
            x = self.down[level](x)
            passed.append(x)
            if level:
                x = F.avg_pool2d(self.narrow[level - 1](x), 2)
        x = x + self.noise(noise).view_as(x)
        for level, stage in enumerate(self.up):
            if level:
                x = doubled(self.widen[level - 1](x))
                x = (x + passed[-1 - level]) * 0.5**0.5
            x = stage(x)
        return F.pixel_shuffle(self.to_image(x), self.arch["patch"])


def started_at(linear: LinearGenerator, **arguments: Any) -> ResidualGenerator:
    """Return a generator that draws the same images as ``linear`` until it is trained; weights use torch's global RNG."""
    net = ResidualGenerator(linear=linear.arch, **arguments)
    net.linear.load_state_dict(linear.state_dict())
    return net


def new_generator(
    linear: LinearGenerator | None, *, classes: int, channels: int, size: int, latent: int, **arguments: int
) -> ImageGenerator:
    """Return the generator that the GAN trains: R3GAN's, or one that starts as ``linear``. Weights use torch's global RNG.

    ``latent``: of the whole, or of the residual's noise; ``arguments``: width, blocks, patch.
    """
    if linear is not None:
        return started_at(linear, noise=latent, **arguments)
    return Generator(classes=classes, channels=channels, size=size, latent=latent, **arguments)
