"""The conditional discriminator: R3GAN's residual design (Huang et al. 2024), scaled down to small budgets.

No normalisation layer anywhere, and twice differentiable, as gradient penalties need. Shapes: B batch, C channels.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from gdd_dist.models.convolution import Conv2d, WholeMapConv2d
from gdd_dist.models.files import arguments
from gdd_dist.models.residual import ResidualStage, scaled_conv, side_widths


class Discriminator(nn.Module):
    """Scores images of a class: [B, C, size, size] float in [-1, 1], labels [B] int64 -> [B] float, higher for real.

    The stages are the generator's in reverse order: pixels enter in patches of `patch` x `patch`, and features of the smallest
    map are projected on the class embedding. Raises UserError for a size that is not `patch` times 4, 5, 6 or 7 times a power of two.
    """

    def __init__(
        self,
        *,
        classes: int,
        channels: int,
        size: int,
        width: int = 64,
        blocks: int = 1,
        embedding: int = 64,
        group_size: int = 16,
        expansion: int = 2,
        patch: int = 1,
    ) -> None:
        super().__init__()
        self.arch = arguments(locals())
        """JSON-compatible arguments that rebuild this discriminator: Discriminator(**arch)."""
        by_side = side_widths(size, width, patch)
        base, widths = min(by_side), list(by_side.values())[::-1]
        depth = blocks * len(widths)
        self.from_image = scaled_conv(channels * patch**2, widths[0], 1, kind=Conv2d)
        self.stages = nn.ModuleList(ResidualStage(w, blocks, depth, group_size, expansion, Conv2d) for w in widths)
        pairs = zip(widths[:-1], widths[1:], strict=True)
        self.changes = nn.ModuleList(scaled_conv(a, b, 1, kind=Conv2d) if a != b else nn.Identity() for a, b in pairs)
        # A learned pooling: depthwise over the whole smallest map, then across channels.
        self.pool = scaled_conv(widths[-1], widths[-1], base, groups=widths[-1], kind=WholeMapConv2d)
        self.features = nn.Linear(widths[-1], embedding, bias=False)
        nn.init.normal_(self.features.weight, std=widths[-1] ** -0.5)
        self.embedding = nn.Embedding(classes, embedding)
        nn.init.normal_(self.embedding.weight, std=embedding**-0.5)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Scores [B] of images [B, C, size, size] in [-1, 1] as members of labels [B] int64."""
        x = self.from_image(F.pixel_unshuffle(images, self.arch["patch"]))
        for level, stage in enumerate(self.stages):
            if level:
                x = self.changes[level - 1](F.avg_pool2d(x, 2))
            x = stage(x)
        features = self.features(self.pool(x).flatten(1))
        return (features * self.embedding(labels)).sum(1)
