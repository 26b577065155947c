"""What generator and discriminator share: R3GAN's residual block without normalisation, and the plan of widths."""

import torch.nn.functional as F
from torch import Tensor, nn

from sharding.errors import UserError

_SLOPE = 0.2
_GAIN = (2 / (1 + _SLOPE**2)) ** 0.5
_BASE = 4


def side_widths(size: int, width: int, patch: int) -> list[int]:
    """Channels at 4, 8, … size / patch positions a side: `width` up to 16, then halved with each doubling, 16 at least.

    Raises UserError for a size or patch that does not end at 4 times a power of two.
    """
    side = size // patch
    if size % patch or side < _BASE or side & (side - 1):
        raise UserError(
            f"images of {size} pixels in patches of {patch} do not suit the GAN, which draws 4, 8, 16 … a side; "
            "set --image-size when building the shards, or another patch"
        )
    sides = [_BASE << level for level in range((side // _BASE).bit_length())]
    return [width if side <= 16 else max(min(width, 16), width * 16 // side) for side in sides]


def scaled_conv(
    inputs: int, outputs: int, kernel: int, *, groups: int = 1, gain: float = 1.0, bias: bool = False
) -> nn.Conv2d:
    """Convolution that keeps the side (kernel 1, 3) or takes 4 to 1 (kernel 4); weights of variance gain^2 / fan-in."""
    conv = nn.Conv2d(inputs, outputs, kernel, padding=1 if kernel == 3 else 0, groups=groups, bias=bias)
    nn.init.normal_(conv.weight, std=gain * (inputs // groups * kernel * kernel) ** -0.5)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


class _ResidualBlock(nn.Module):
    """x + conv1(act(conv3(act(conv1(x))))): widened and grouped in the middle, the last convolution starts at zero.

    The others are scaled by depth^(-1/4), so that the sum over blocks keeps its variance (Fixup, as in R3GAN).
    """

    def __init__(self, width: int, depth: int, group_size: int, expansion: int) -> None:
        super().__init__()
        inner, gain = width * expansion, _GAIN * depth**-0.25
        self.first = scaled_conv(width, inner, 1, gain=gain, bias=True)
        self.middle = scaled_conv(inner, inner, 3, groups=max(1, inner // group_size), gain=gain, bias=True)
        self.last = scaled_conv(inner, width, 1, gain=0.0)

    def forward(self, x: Tensor) -> Tensor:
        y = F.leaky_relu(self.first(x), _SLOPE)
        y = F.leaky_relu(self.middle(y), _SLOPE)
        return x + self.last(y)


class ResidualStage(nn.Sequential):
    """`blocks` residual blocks at one resolution, in a network of `depth` blocks in all: [B, width, H, W] -> same."""

    def __init__(self, width: int, blocks: int, depth: int, group_size: int, expansion: int) -> None:
        if width * expansion % group_size and width * expansion > group_size:
            raise UserError(
                f"GAN width {width} times expansion {expansion} is no multiple of group size {group_size}; change one"
            )
        super().__init__(*(_ResidualBlock(width, depth, group_size, expansion) for _ in range(blocks)))
