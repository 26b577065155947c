"""Layers made for double backwards: torch's numbers to the last order, and a discriminator step in few operations."""

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gdd_dist.config.presets import PRESETS
from gdd_dist.config.settings import Gan
from gdd_dist.models import residual
from gdd_dist.models.convolution import Conv2d, WholeMapConv2d, leaky_relu
from gdd_dist.models.discriminator import Discriminator
from gdd_dist.training import losses
from gdd_dist.training.adversaries import Adversaries

LAYERS: list[dict[str, Any]] = [
    {"kernel_size": 1},
    {"kernel_size": 3, "padding": 1, "bias": False},
    {"kernel_size": 3, "padding": 1, "groups": 3},
    {"kernel_size": 3, "padding": (0, 2), "stride": (2, 1), "groups": 2},
    {"kernel_size": 2, "stride": 3, "dilation": 2, "bias": False, "groups": 6},
]


class Operations(TorchDispatchMode):
    """Counts what is dispatched, views apart, and which gradients convolutions computed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()
        self.masks: Counter[tuple[bool, ...]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen["views" if func.is_view else str(func)] += 1
        if func is torch.ops.aten.convolution_backward.default:
            self.masks[tuple(args[-1])] += 1
        return func(*args, **(kwargs or {}))


def pair(**options: Any) -> tuple[nn.Conv2d, Conv2d, Tensor]:
    """torch's layer, ours with the same weights, images; float64."""
    torch.manual_seed(0)
    theirs, ours = (kind(6, 12, dtype=torch.float64, **options) for kind in (nn.Conv2d, Conv2d))
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours, torch.randn(2, 6, 7, 7, dtype=torch.float64)


def orders(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, its first derivatives in images and weights, and the second derivatives through each of them."""
    x, weights = x.clone().requires_grad_(), list(layer.parameters())
    y = layer(x)
    first = torch.autograd.grad(y.pow(3).sum(), [x, *weights], create_graph=True)
    second = [torch.autograd.grad(g.pow(2).sum(), [x, *weights], retain_graph=True) for g in first]
    return [y, *first, *(g for gradients in second for g in gradients)]


@pytest.mark.parametrize("options", LAYERS)
def test_a_convolution_has_torchs_numbers_to_the_second_derivative(options: dict[str, Any]) -> None:
    theirs, ours, x = pair(**options)
    for expected, found in zip(orders(theirs, x), orders(ours, x), strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", LAYERS)
def test_a_convolutions_derivatives_equal_finite_differences(options: dict[str, Any]) -> None:
    layer, (names, weights) = pair(**options)[1], zip(*pair(**options)[1].named_parameters(), strict=True)
    x = torch.randn(1, 6, 4, 4, dtype=torch.float64, requires_grad=True)

    def of(x: Tensor, *weights: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, weights, strict=True)), x)

    assert torch.autograd.gradcheck(of, (x, *weights))
    assert torch.autograd.gradgradcheck(of, (x, *weights))


def test_who_asks_for_the_images_gradient_pays_for_no_weights() -> None:
    _, layer, x = pair(kernel_size=3, groups=2)
    x.requires_grad_()
    with Operations() as operations:
        (gradient,) = torch.autograd.grad(layer(x * 1).sum(), x, create_graph=True)
        assert operations.masks == {(True, False, False): 1}
        gradient.square().sum().backward()
    assert operations.masks[False, True, False] == 1
    assert layer.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_a_convolution_is_torchs_and_its_weights_gradient_float32(dtype: torch.dtype) -> None:
    theirs, ours, x = (part.float() for part in pair(kernel_size=3, groups=2))
    with torch.autocast("cpu", dtype):
        expected, found = theirs(x), ours(x)
    assert found.dtype == dtype
    assert found.equal(expected)
    for y in (expected, found):
        y.float().square().sum().backward()
    assert ours.weight.grad.dtype == torch.float32
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("side", [4, 7])
def test_a_whole_maps_convolution_is_torchs(side: int) -> None:
    torch.manual_seed(0)
    theirs, ours = (kind(6, 6, side, groups=6, bias=False, dtype=torch.float64) for kind in (nn.Conv2d, WholeMapConv2d))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 6, side, side, dtype=torch.float64)
    for expected, found in zip(orders(theirs, x), orders(ours, x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_leaky_relu_is_torchs_to_the_second_derivative() -> None:
    torch.manual_seed(0)
    x = torch.randn(40, dtype=torch.float64, requires_grad=True)
    found = []
    for layer in (F.leaky_relu, leaky_relu):
        y = layer(x, 0.2)
        (first,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        found.append((y, first, torch.autograd.grad(first.pow(2).sum(), x)[0]))
    for expected, ours in zip(*found, strict=True):
        assert ours.equal(expected)
    assert torch.autograd.gradgradcheck(lambda v: leaky_relu(v, 0.2).square(), (x,))


class OneProcess:
    """An engine without ranks: the network itself, and a plain backward."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self.network(*inputs)

    def backward(self, loss: Tensor) -> None:
        loss.backward()


def discriminator_step(network: nn.Module, real: Tensor, fake: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The trainer's own."""
    nets: Any = SimpleNamespace(d=OneProcess(network))
    return Adversaries._discriminator_backward(nets, real, fake, labels, gamma=0.7)


def plain_step(network: nn.Module, real: Tensor, fake: Tensor, labels: Tensor) -> None:
    """The formula with a forward of each side."""
    real, fake = real.clone().requires_grad_(), fake.clone().requires_grad_()
    a, b = network(real, labels), network(fake, labels)
    gradients = torch.autograd.grad([a.sum() + b.sum()], [real, fake], create_graph=True)
    penalty = sum(g.flatten(1).square().sum(1).mean() for g in gradients)
    (losses.relativistic_discriminator(a, b) + 0.5 * 0.7 * penalty).backward()


@pytest.mark.parametrize("size", [8, 28])
def test_a_discriminator_step_has_the_gradients_of_torchs_layers_and_two_forwards(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    network = Discriminator(classes=3, channels=2, size=size, width=16, blocks=2, group_size=8).double()
    for weight in network.parameters():
        nn.init.normal_(weight, std=0.2)
    real, fake = torch.randn(2, 4, 2, size, size, dtype=torch.float64)
    labels = torch.tensor([0, 2, 1, 1])
    discriminator_step(network, real, fake, labels)
    found = {name: weight.grad.clone() for name, weight in network.named_parameters()}
    network.zero_grad()
    monkeypatch.setattr(residual, "leaky_relu", F.leaky_relu)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            layer.__class__ = nn.Conv2d
    plain_step(network, real, fake, labels)
    for name, weight in network.named_parameters():
        error = (found[name] - weight.grad).norm() / weight.grad.norm()
        # The loss needs float32's precision by design, its gradients in scores are rounded to that.
        assert error < 1e-6, name


def test_a_discriminator_step_of_preset_cifar10_takes_few_operations() -> None:
    preset, gan = PRESETS["cifar10"], Gan()
    with torch.device("meta"):
        network = Discriminator(
            classes=10, channels=3, size=32, width=preset["gan.d_width"], blocks=gan.d_blocks, patch=gan.patch
        )
        real, fake = torch.randn(2, 8, 3, 32, 32)
        labels = torch.zeros(8, dtype=torch.int64)
    with Operations() as operations:
        discriminator_step(network, real, fake, labels)
    convolutions = sum(isinstance(m, Conv2d) for m in network.modules())
    assert convolutions == 26
    # Forward, and what the penalty's gradient makes of it; then gradients: of images, of the penalty's weights, of both.
    assert operations.seen["aten.convolution.default"] == 2 * convolutions
    assert operations.seen["aten.convolution_backward.default"] == 3 * convolutions
    views = operations.seen.pop("views")
    assert operations.seen.total() <= 360, operations.seen
    assert views <= 200
