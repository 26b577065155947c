"""Shared by generator and discriminator: R3GAN's residual block without normalisation, and the widths of stages."""

from torch import Tensor, nn

from gdd_dist.models.convolution import leaky_relu
from sharding.errors import UserError

_SLOPE = 0.2
_GAIN = (2 / (1 + _SLOPE**2)) ** 0.5
_SMALLEST = 4


def side_widths(size: int, width: int, patch: int) -> dict[int, int]:
    """Return side → channels for the sides of feature maps, from a base of 4 to 7, doubled up to size / patch.

    There are `width` channels up to side 16, then half as many with each doubling, but at least 16. Raises UserError if size / patch
    is not 4, 5, 6 or 7 times a power of two.
    """
    side = size // patch
    doublings = side.bit_length() - _SMALLEST.bit_length()
    if size % patch or side < _SMALLEST or side % (1 << doublings):
        raise UserError(
            f"images of {size} pixels in patches of {patch} do not fit the GAN: size / patch must be 4, 5, 6 or 7 times a power of "
            "two; set --image-size when building the shards, or another --gan.patch"
        )
    sides = [side >> level for level in range(doublings, -1, -1)]
    return {s: max(min(width, 16), width >> max(0, (s - 1).bit_length() - 4)) for s in sides}


def scaled_conv(
    inputs: int,
    outputs: int,
    kernel: int,
    *,
    groups: int = 1,
    gain: float = 1.0,
    bias: bool = False,
    kind: type[nn.Conv2d] = nn.Conv2d,
) -> nn.Conv2d:
    """Convolution that keeps the side (kernel 1, 3) or takes its kernel's side to 1; weights of variance gain^2 / fan-in."""
    conv = kind(inputs, outputs, kernel, padding=1 if kernel == 3 else 0, groups=groups, bias=bias)
    nn.init.normal_(conv.weight, std=gain * (inputs // groups * kernel * kernel) ** -0.5)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


class _ResidualBlock(nn.Module):
    """x + conv1(act(conv3(act(conv1(x))))): the middle is wider and grouped; the last convolution is zero at first.

    The others are scaled by depth^(-1/4), so that the sum over blocks keeps its variance (Fixup, as in R3GAN).
    """

    def __init__(self, width: int, depth: int, group_size: int, expansion: int, kind: type[nn.Conv2d]) -> None:
        super().__init__()
        inner, gain, groups = width * expansion, _GAIN * depth**-0.25, max(1, width * expansion // group_size)
        self.first = scaled_conv(width, inner, 1, gain=gain, bias=True, kind=kind)
        self.middle = scaled_conv(inner, inner, 3, groups=groups, gain=gain, bias=True, kind=kind)
        self.last = scaled_conv(inner, width, 1, gain=0.0, kind=kind)

    def forward(self, x: Tensor) -> Tensor:
        y = leaky_relu(self.first(x), _SLOPE)
        y = leaky_relu(self.middle(y), _SLOPE)
        return x + self.last(y)


class ResidualStage(nn.Sequential):
    """`blocks` residual blocks at one resolution, in a network of `depth` blocks in all: [B, width, H, W] -> same.

    `kind`: of its convolutions.
    """

    def __init__(
        self,
        width: int,
        blocks: int,
        depth: int,
        group_size: int,
        expansion: int,
        kind: type[nn.Conv2d] = nn.Conv2d,
    ) -> None:
        if width * expansion % group_size and width * expansion > group_size:
            raise UserError(
                f"GAN width {width} times expansion {expansion} is not a multiple of the group size {group_size}; change the width"
            )
        super().__init__(*(_ResidualBlock(width, depth, group_size, expansion, kind) for _ in range(blocks)))
