"""The Gaussians in training: latents are turned and shifted by class before they become images.

Shapes: B batch, C classes, K latent.
"""

import torch
from torch import Tensor, nn

from gdd_dist.models.gaussian import LinearGenerator, by_class, pack
from gdd_dist.models.generator import ImageGenerator

SHIFT = 30.0
"""How much faster a mean moves than an entry of a turn, at one learning rate: a turn adds up K entries, a shift is one."""


class MovedGaussian(ImageGenerator):
    """Latents [B, K] float, labels [B] int64 -> [B, channels, size, size] float in [-1, 1]: draws what ``linear`` draws until it is trained.

    image = linear(z + turn[y] z + SHIFT · shift[y]), still one Gaussian per class. Parameters, zero at first: turn [C, K, K], shift
    [C, K]; the weights of ``linear`` are buffers. The clamp to [-1, 1] is ignored in the backward pass (straight-through).
    """

    def __init__(self, linear: LinearGenerator) -> None:
        super().__init__(linear.arch, linear.arch)
        self.linear = linear
        self.turn = nn.Parameter(torch.zeros(linear.classes, linear.latent, linear.latent))
        self.shift = nn.Parameter(torch.zeros(linear.classes, linear.latent))

    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:
        """Images [B, channels, size, size] in [-1, 1] of latents [B, K] (standard normal) and labels [B] int64."""
        with torch.autocast(latents.device.type, enabled=False):
            z = latents.float()
            turned = by_class(z, labels, self.classes, lambda part: self.turn[part], lambda turn, rows: rows @ turn.mT)
            image = self.linear.linear(z + turned + SHIFT * self.shift[labels], labels)
        return image + (image.clamp(-1, 1) - image).detach()

    @torch.no_grad()
    def folded(self) -> LinearGenerator:
        """Return the generator with the same Gaussians, as the step gaussian writes it, on the CPU: turns and shifts become means and roots."""
        net = self.linear
        means, roots = net.class_means.cpu().double(), torch.zeros(net.roots.shape)
        for y in range(net.classes):
            root = net.root(y)
            moved = root + root @ self.turn[y].cpu().double()
            means[y] += SHIFT * root @ self.shift[y].cpu().double()
            # QR finds the lower triangular root of the same covariance without squaring small values.
            triangle = torch.linalg.qr(moved.T).R.T
            signs = torch.where(triangle.diagonal() < 0, -1.0, 1.0)
            roots[y] = pack(triangle * signs, net.places.cpu())
        return net.with_classes(means, roots)
