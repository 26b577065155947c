"""The discriminator's grouped convolutions, one a resolution, differentiated twice: torch's nn.Conv2d against ours."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import torch
from common import line
from torch import Tensor, nn

from gdd_dist.engines.precision import autocast
from gdd_dist.models.convolution import Conv2d
from gpu_phases import Line, Task
from gpu_phases.bench import SMALL, Bench, synchronize

ROUNDS = 5


def find(task: Task) -> Iterator[Line]:
    """A line for each layer shape. Raises where ours has other gradients."""
    settings = [*(SMALL if task.small else ()), "--precision", "bf16"]
    bench = Bench(task.out / "data", task.out / ("double-small" if task.small else "preset"), task.device, settings)
    device = bench.ctx.device
    with bench.trainee("gan") as trainee:
        shapes = layers(trainee.nets.discriminator, 2 * bench.batch["gan"], bench.ctx.manifest.height, device)
    for layer, shape in shapes:
        ours, theirs = (made(kind, layer).to(device) for kind in (Conv2d, nn.Conv2d))
        theirs.load_state_dict(ours.state_dict())
        x = torch.randn(shape, device=device)
        off = max(
            float((a - b).norm() / b.norm())
            for a, b in zip(penalty(ours, x, "float32"), penalty(theirs, x, "float32"), strict=True)
        )
        rates: list[list[float]] = [[], []]
        for _ in range(ROUNDS):  # in turn
            for conv, found in zip((ours, theirs), rates, strict=True):
                found.append(shape[0] / seconds(conv, x, bench.ctx.precision))
        settings = {"images": list(shape), "weight": list(ours.weight.shape), "groups": ours.groups, "off": off}
        yield line("gpu/double_backward", np.array(rates[0]), {"torch": np.array(rates[1])}, "images/s", settings)
        assert off < 1e-3, f"our second derivative of {shape} is {off} off"


def layers(net: nn.Module, batch: int, side: int, device: torch.device) -> list[tuple[nn.Conv2d, tuple[int, ...]]]:
    """The grouped convolutions of a discriminator, one of each shape, and what goes in for a batch of both sides."""
    found: dict[tuple[int, ...], tuple[nn.Conv2d, tuple[int, ...]]] = {}

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if isinstance(module, Conv2d) and module.groups > 1:
            shape = (batch, *inputs[0].shape[1:])
            found.setdefault((*shape, *module.weight.shape), (module, shape))

    hooks = [m.register_forward_pre_hook(note) for m in net.modules()]
    with torch.no_grad():
        net(
            torch.zeros(1, net.arch["channels"], side, side, device=device),
            torch.zeros(1, dtype=torch.int64, device=device),
        )
    for hook in hooks:
        hook.remove()
    return list(found.values())


def made(kind: type[nn.Conv2d], layer: nn.Conv2d) -> nn.Conv2d:
    """A layer like another."""
    sizes = layer.in_channels, layer.out_channels, layer.kernel_size
    torch.manual_seed(0)
    return kind(*sizes, padding=layer.padding, groups=layer.groups, bias=layer.bias is not None)


def penalty(conv: nn.Conv2d, x: Tensor, precision: str) -> list[Tensor]:
    """The weights' gradients of a gradient penalty, as the discriminator's step takes them."""
    conv.zero_grad()
    leaf = x.detach().requires_grad_()
    with autocast(x.device, precision):
        y = conv(leaf).float()
    (gradient,) = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
    gradient.square().mean().backward()
    return [conv.weight.grad.clone()]


def seconds(conv: nn.Conv2d, x: Tensor, precision: str) -> float:
    """Of one, without what a first call pays for."""
    penalty(conv, x, precision)
    synchronize(x.device)
    begin, times = time.perf_counter(), 1 if x.device.type == "cpu" else 20
    for _ in range(times):
        penalty(conv, x, precision)
    synchronize(x.device)
    return (time.perf_counter() - begin) / times
