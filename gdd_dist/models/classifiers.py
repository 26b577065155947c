"""The classifiers that serve as teachers and students, as the dataset-distillation literature builds them.

Only those named `_bn` use batch statistics, so with the others a sample's logits do not depend on its batch. Each takes float images in
[-1, 1] and normalises them itself, so a file of weights is self-contained. Shapes: B batch, C image channels, K classes.
"""

import difflib
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gdd_dist.models.names import TORCHVISION, has_batch_norm
from sharding.errors import UserError

WIDEST = 65_536
CONSTANT = 1e-6
"""A channel with at most this standard deviation is constant, up to rounding."""
_GROUP_CHANNELS = 8
"""Channels that share a group norm in the ResNets."""


Norm = Callable[[int], nn.Module]
"""Number of channels → normalization layer."""


class Classifier(nn.Module):
    """Normalise, extract features, classify: [B, C, H, W] float in [-1, 1] -> logits [B, K].

    ``recompute``: keep only the activations between stages for the backward pass, and recompute the others.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, body: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1))
        self.body = body
        self.recompute = False

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, K] of images [B, C, H, W] in [-1, 1]."""
        x = (images - self.mean) / self.std
        if not (self.recompute and torch.is_grad_enabled()):
            logits: Tensor = self.body(x)
            return logits
        *early, last = _stages(self.body)  # recomputing the last stage would save nothing
        for stage in early:
            x = checkpoint(stage, x, use_reentrant=False, preserve_rng_state=False)
        logits = last(x)
        return logits


def _stages(body: nn.Module) -> list[nn.Sequential]:
    """Return the layers of a body in order, split before each convolution and each residual block."""
    stages: list[list[nn.Module]] = [[]]
    for layer in body.children():
        if isinstance(layer, (nn.Conv2d, _ResidualBlock)) and stages[-1]:
            stages.append([])
        stages[-1].append(layer)
    return [nn.Sequential(*layers) for layers in stages]


def _instance_norm(width: int) -> nn.Module:
    # GroupNorm(C, C) is instance norm with affine parameters, and is fast in bfloat16, too.
    return nn.GroupNorm(width, width)


def _group_norm(width: int) -> nn.Module:
    return nn.GroupNorm(max(1, width // _GROUP_CHANNELS) if width % _GROUP_CHANNELS == 0 else 1, width)


def _conv_norm_relu(inputs: int, width: int, kernel: int = 3) -> list[nn.Module]:
    # No bias, because the following normalization would cancel it.
    conv = nn.Conv2d(inputs, width, kernel, padding=kernel // 2, bias=False)
    return [conv, _instance_norm(width), nn.ReLU(inplace=True)]


class Halve(nn.Module):
    """``nn.AvgPool2d(2)``. In float32 on a CPU it sums neighbours, which is the same up to rounding and much faster."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C, H // 2, W // 2]."""
        if x.device.type != "cpu" or x.dtype != torch.float32 or x.shape[2] % 2 or x.shape[3] % 2:
            return F.avg_pool2d(x, 2)
        upper, lower = x.unflatten(2, (-1, 2)).unbind(3)
        left, right = (upper + lower).unflatten(3, (-1, 2)).unbind(4)
        return (left + right) * 0.25


def convnet(*, channels: int, size: int, classes: int, width: int = 128) -> nn.Module:
    """The ConvNet of dataset distillation (Zhao et al. 2021): depth 3 up to 32 pixels, one more per doubling."""
    depth = 3
    while 8 << depth - 1 < size:
        depth += 1
    layers: list[nn.Module] = []
    for level in range(depth):
        layers += [*_conv_norm_relu(width if level else channels, width), Halve()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * (size >> depth) ** 2, classes))


class _ResidualBlock(nn.Module):
    """Basic block (He et al. 2016); `pool` halves by averaging instead of by stride."""

    def __init__(self, inputs: int, width: int, stride: int, pool: bool, norm: Norm) -> None:
        super().__init__()
        step = 1 if pool else stride
        halve = [Halve()] if pool and stride == 2 else []
        self.residual = nn.Sequential(
            nn.Conv2d(inputs, width, 3, stride=step, padding=1, bias=False),
            norm(width),
            nn.ReLU(inplace=True),
            *halve,
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            norm(width),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != width:
            conv = nn.Conv2d(inputs, width, 1, stride=step, bias=False)
            self.shortcut = nn.Sequential(*halve, conv, norm(width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.residual(x) + self.shortcut(x))


def resnet(
    *,
    channels: int,
    size: int,
    classes: int,
    width: int = 64,
    blocks: Sequence[int] = (1, 1, 1, 1),
    pool: bool = False,
    norm: Norm = _group_norm,
) -> nn.Module:
    """ResNet for small images: 3x3 stem, four stages of basic blocks, norm, global average (He et al. 2016)."""
    layers: list[nn.Module] = [
        nn.Conv2d(channels, width, 3, padding=1, bias=False),
        norm(width),
        nn.ReLU(inplace=True),
    ]
    inputs = width
    for stage, count in enumerate(blocks):
        for index in range(count):
            stride = 2 if stage and not index else 1
            layers.append(_ResidualBlock(inputs, width << stage, stride, pool, norm))
            inputs = width << stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


def vgg11(*, channels: int, size: int, classes: int, width: int = 64) -> nn.Module:
    """VGG-11 with instance norm and one linear layer, as in DC-bench; no pooling that would leave a single pixel."""
    layers: list[nn.Module] = []
    inputs, side = channels, size
    for multiples in ((1,), (2,), (4, 4), (8, 8), (8, 8)):
        for multiple in multiples:
            layers += _conv_norm_relu(inputs, width * multiple)
            inputs = width * multiple
        if side >= 4:  # instance norm of a single pixel is zero
            layers.append(nn.MaxPool2d(2))
            side //= 2
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


def alexnet(*, channels: int, size: int, classes: int, width: int = 128) -> nn.Module:
    """AlexNet for small images, without norm, as in DC-bench: widths 1, 1.5, 2, 1.5, 1.5 times 128."""
    narrow, wide = width * 3 // 2, width * 2
    shapes = ((channels, width, 5, True), (width, narrow, 5, True), (narrow, wide, 3, False), (wide, narrow, 3, False))
    layers: list[nn.Module] = []
    for inputs, outputs, kernel, halve in (*shapes, (narrow, narrow, 3, True)):
        layers += [nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2), nn.ReLU(inplace=True)]
        layers += [nn.MaxPool2d(2)] if halve else []
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(narrow * (size >> 3) ** 2, classes))


CLASSIFIERS: dict[str, Callable[..., nn.Module]] = {
    "convnet": convnet,
    "resnet10": partial(resnet, blocks=(1, 1, 1, 1)),
    "resnet18": partial(resnet, blocks=(2, 2, 2, 2)),
    "resnet10_ap": partial(resnet, blocks=(1, 1, 1, 1), pool=True),
    "resnet18_ap": partial(resnet, blocks=(2, 2, 2, 2), pool=True),
    "resnet10_bn": partial(resnet, blocks=(1, 1, 1, 1), norm=nn.BatchNorm2d),
    "resnet18_bn": partial(resnet, blocks=(2, 2, 2, 2), norm=nn.BatchNorm2d),
    "vgg11": vgg11,
    "alexnet": alexnet,
}
"""Architectures by name; a name may carry its width, as in `convnet:64`."""


def parse_classifier(name: str) -> tuple[str, int | None]:
    """Split NAME or NAME:WIDTH; UserError for an unknown architecture or an invalid width."""
    base, colon, width = name.partition(":")
    if base not in CLASSIFIERS:
        near = difflib.get_close_matches(base, CLASSIFIERS, n=1, cutoff=0.0)[0]
        raise UserError(f"unknown classifier '{name}'; did you mean '{near}'? known: {', '.join(CLASSIFIERS)}")
    if colon and not (width.isascii() and width.isdigit() and len(width) < 6 and 0 < int(width) <= WIDEST):
        raise UserError(
            f"classifier '{name}' has no valid width; write {base} or {base}:WIDTH, for example {base}:64, at most {WIDEST}"
        )
    return base, int(width) if colon else None


def _torchvision(name: str, channels: int, classes: int) -> nn.Module:
    """Return a torchvision network, which needs three channels; UserError for an unknown name."""
    from torchvision import models  # imported here, because torchvision is only needed for its networks

    if channels != 3:
        raise UserError(f"{name} needs images of 3 channels, but these have {channels}; give another classifier")
    try:
        net: nn.Module = models.get_model(name.removeprefix(TORCHVISION), weights=None, num_classes=classes)
    except ValueError as e:
        raise UserError(
            f"torchvision has no classifier '{name.removeprefix(TORCHVISION)}'; see its list of models"
        ) from e
    return net


def parse_student(name: str) -> tuple[str, int | None]:
    """Like parse_classifier, but also UserError for batch normalization: the last batch of a student may be a single image."""
    if has_batch_norm(name):
        raise UserError(f"classifier '{name}' can only be a teacher; a student must not have batch normalization")
    return parse_classifier(name)


def divisors(std: Sequence[float]) -> list[float]:
    """Return the divisors of channels: their standard deviations, or 1 for a constant channel."""
    return [s if s > CONSTANT else 1.0 for s in std]


def build_classifier(
    name: str, *, channels: int, size: int, classes: int, mean: Sequence[float], std: Sequence[float]
) -> Classifier:
    """A freshly initialised classifier (torch's global generator) for images [B, channels, size, size] in [-1, 1].

    `name` is one of CLASSIFIERS, with `:WIDTH` for another than the usual width; `mean` and `std` are per channel, of
    pixels in [-1, 1]; 0 (a constant channel) counts as std 1.
    Raises UserError for an unknown name, fewer than 8 pixels, or statistics that do not fit.
    """
    if name.startswith(TORCHVISION):
        return Classifier(_torchvision(name, channels, classes), mean, divisors(std))
    base, width = parse_classifier(name)
    if size < 8:
        raise UserError(f"images of {size} pixels are too small for classifier '{name}'; it needs 8 or more")
    if not len(mean) == len(std) == channels or min(std) < 0:
        raise UserError(
            f"mean {list(mean)} and std {list(std)} do not fit {channels} channels; give one each, std >= 0"
        )
    options = {} if width is None else {"width": width}
    body = CLASSIFIERS[base](channels=channels, size=size, classes=classes, **options)
    return Classifier(body, mean, divisors(std))


def count_weights(build: Callable[[], nn.Module]) -> float:
    """Return the number of weights of the network that ``build`` returns, without allocating them; infinity if it exceeds 64 bits.

    The first call imports torch._dynamo, which takes as long as importing torch.
    """
    try:
        with torch.device("meta"):
            return sum(p.numel() for p in build().parameters())
    except RuntimeError:
        return float("inf")


def classifier_weights(name: str, *, channels: int, size: int, classes: int) -> float:
    """Return the number of weights of a classifier for such images, as `count_weights` does."""
    one = [1.0] * channels
    return count_weights(
        lambda: build_classifier(name, channels=channels, size=size, classes=classes, mean=one, std=one)
    )
