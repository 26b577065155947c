"""Networks: shapes, no batch statistics, self-contained normalisation, names, second derivatives."""

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gdd_dist.models.classifiers import CLASSIFIERS, Classifier, Halve, build_classifier, has_batch_norm
from gdd_dist.models.discriminator import Discriminator
from gdd_dist.models.generator import Generator, doubled
from gdd_dist.models.residual import side_widths
from sharding.errors import UserError

SMALL: dict[str, Any] = {"classes": 5, "width": 16, "embedding": 8}
MEAN, STD = (-0.1, 0.0, 0.2), (0.4, 0.5, 0.6)


def classifier(name: str, size: int = 16, channels: int = 3, classes: int = 5) -> Classifier:
    return build_classifier(
        name, channels=channels, size=size, classes=classes, mean=MEAN[:channels], std=STD[:channels]
    )


def images(count: int, size: int = 16, channels: int = 3) -> Tensor:
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("side", [(6, 8), (7, 9), (2, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_halving_is_average_pooling(dtype: torch.dtype, side: tuple[int, int]) -> None:
    """In bfloat16 it is torch's own, which rounds once."""
    x = torch.randn(2, 3, *side, generator=torch.Generator().manual_seed(0)).to(dtype)
    ours, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    found, expected = Halve()(ours), nn.functional.avg_pool2d(other, 2)
    found.square().sum().backward()
    expected.square().sum().backward()
    exact = {"atol": 0.0, "rtol": 0.0} if dtype != torch.float32 else {"atol": 1e-6, "rtol": 1e-6}
    torch.testing.assert_close(found, expected, **exact)
    torch.testing.assert_close(ours.grad, other.grad, **exact)


@pytest.mark.parametrize("size", [8, 16, 28, 32, 64, 96])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifier_shapes_and_gradients_at_every_size(name: str, size: int) -> None:
    model = classifier(f"{name}:16", size)
    logits = model(images(2, size))
    assert logits.shape == (2, 5)
    logits.square().sum().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert torch.isfinite(parameter.grad).all(), parameter_name
    assert model.body[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", [name for name in CLASSIFIERS if not has_batch_norm(name)])
def test_classifier_ignores_batch_mates_and_mode(name: str) -> None:
    model = classifier(f"{name}:16")
    x = images(6)
    whole = model.train()(x)
    torch.testing.assert_close(model.eval()(x[2:3]), whole[2:3], atol=1e-5, rtol=1e-4)
    assert set(dict(model.named_buffers())) == {"mean", "std"}


def test_classifier_normalises_inside_and_its_state_carries_the_statistics() -> None:
    model = classifier("convnet:16")
    x = images(3)
    statistics = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    mean, std = statistics
    torch.testing.assert_close(model(x), model.body((x - mean) / std))
    other = build_classifier("convnet:16", channels=3, size=16, classes=5, mean=(0, 0, 0), std=(1, 1, 1))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize(("size", "depth"), [(8, 3), (16, 3), (32, 3), (64, 4), (128, 5)])
def test_convnet_depth_follows_the_size(size: int, depth: int) -> None:
    model = classifier("convnet", size)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == depth
    assert {c.out_channels for c in convolutions} == {128}


def test_average_pool_variants_have_no_strides() -> None:
    for name in ("resnet10_ap", "resnet18_ap"):
        assert all(m.stride == (1, 1) for m in classifier(f"{name}:8").modules() if isinstance(m, nn.Conv2d))
    assert any(m.stride == (2, 2) for m in classifier("resnet10:8").modules() if isinstance(m, nn.Conv2d))


@pytest.mark.parametrize(
    ("name", "hint"),
    [("convnt", "'convnet'"), ("resnet-18", "'resnet18'"), ("convnet:zero", "convnet:64"), ("convnet:0", "convnet:64")],
)
def test_unknown_names_are_one_line_with_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(UserError, match=hint) as error:
        classifier(name)
    assert "\n" not in str(error.value)


def test_statistics_and_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match="channels"):
        build_classifier("convnet", channels=1, size=16, classes=5, mean=MEAN, std=STD)
    with pytest.raises(UserError, match="too small"):
        classifier("convnet", size=4)


@pytest.mark.parametrize(
    ("size", "channels", "patch"),
    [
        (8, 1, 1),
        (16, 1, 2),
        (16, 1, 1),
        (32, 3, 1),
        (64, 3, 2),
        (28, 1, 1),
        (28, 1, 2),
        (48, 3, 1),
        (80, 3, 4),
        (96, 3, 1),
    ],
)
def test_gan_shapes_range_and_gradients(size: int, channels: int, patch: int) -> None:
    generator = Generator(**SMALL, size=size, channels=channels, patch=patch, latent=12)
    discriminator = Discriminator(**SMALL, size=size, channels=channels, patch=patch)
    labels = torch.tensor([0, 4, 2])
    drawn = generator(torch.randn(3, 12), labels)
    assert drawn.shape == (3, channels, size, size)
    assert drawn.abs().max() <= 1
    scores = discriminator(drawn, labels)
    assert scores.shape == (3,)
    scores.sum().backward()
    for network in (generator, discriminator):
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters())


def test_gan_ignores_batch_mates() -> None:
    generator, discriminator = Generator(**SMALL, size=16, channels=1), Discriminator(**SMALL, size=16, channels=1)
    awaken(generator, discriminator)
    latents, labels = torch.randn(6, generator.latent), torch.arange(6) % 5
    drawn = generator(latents, labels)
    torch.testing.assert_close(generator(latents[4:5], labels[4:5]), drawn[4:5], atol=1e-6, rtol=1e-5)
    scores = discriminator(drawn, labels)
    torch.testing.assert_close(discriminator(drawn[4:5], labels[4:5]), scores[4:5], atol=1e-6, rtol=1e-5)
    assert not list(generator.buffers())
    assert not list(discriminator.buffers())


def awaken(*networks: nn.Module) -> None:
    """Give the convolutions that start at zero some weight, so that every layer takes part."""
    for network in networks:
        for parameter in network.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.1)


def test_latent_and_label_both_matter() -> None:
    generator = Generator(**SMALL, size=16, channels=1)
    latents = torch.randn(2, generator.latent)
    zero = torch.tensor([0, 0])
    first = generator(latents, zero)
    assert not torch.allclose(first[0], first[1])
    assert not torch.allclose(first, generator(latents, zero + 1))


@pytest.mark.parametrize(("size", "patch"), [(16, 2), (28, 1), (48, 1), (80, 1), (96, 1)])
def test_gradient_penalty_reaches_every_weight_and_is_finite(size: int, patch: int) -> None:
    discriminator = Discriminator(**SMALL, size=size, channels=1, patch=patch)
    awaken(discriminator)
    x = images(4, size, channels=1).requires_grad_()
    scores = discriminator(x, torch.tensor([0, 1, 2, 3]))
    (gradient,) = torch.autograd.grad(scores.sum(), x, create_graph=True)
    gradient.square().sum().backward()
    for name, parameter in discriminator.named_parameters():
        if not name.endswith("bias"):  # piecewise linear: the slope does not move with most biases
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
            assert parameter.grad.abs().sum() > 0, name


def test_second_derivative_equals_finite_differences() -> None:
    torch.manual_seed(0)
    discriminator = Discriminator(classes=2, channels=1, size=8, width=4, embedding=4, group_size=4).double()
    awaken(discriminator)
    labels = torch.tensor([0, 1])
    x = images(2, 8, 1).double().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda v: discriminator(v, labels).square().sum(), (x,))


@pytest.mark.parametrize(
    ("size", "patch", "sides", "widths"),
    [
        (16, 2, [4, 8], [64, 64]),
        (16, 1, [4, 8, 16], [64, 64, 64]),
        (64, 1, [4, 8, 16, 32, 64], [64, 64, 64, 32, 16]),
        (256, 1, [4, 8, 16, 32, 64, 128, 256], [64, 64, 64, 32, 16, 16, 16]),
        (28, 1, [7, 14, 28], [64, 64, 32]),
        (28, 4, [7], [64]),
        (80, 1, [5, 10, 20, 40, 80], [64, 64, 32, 16, 16]),
        (96, 1, [6, 12, 24, 48, 96], [64, 64, 32, 16, 16]),
    ],
)
def test_widths_halve_from_16_positions_a_side_on(size: int, patch: int, sides: list[int], widths: list[int]) -> None:
    assert side_widths(size, 64, patch) == dict(zip(sides, widths, strict=True))


@pytest.mark.parametrize("side", [4, 5, 6, 7, 8, 14])
def test_doubling_is_bilinear_and_so_is_its_gradient(side: int) -> None:
    x = torch.randn(2, 3, side, side, dtype=torch.float64, requires_grad=True)
    expected = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    found, weights = doubled(x), torch.randn(expected.shape, dtype=torch.float64)
    torch.testing.assert_close(found, expected)
    gradients = (torch.autograd.grad((y * weights).sum(), x)[0] for y in (found, expected))
    torch.testing.assert_close(*gradients)


def test_networks_are_rebuilt_from_their_arch() -> None:
    for network in (
        Generator(**SMALL, size=32, channels=3, latent=20, blocks=2),
        Discriminator(**SMALL, size=16, channels=1, patch=2),
    ):
        again = type(network)(**json.loads(json.dumps(network.arch)))
        again.load_state_dict(network.state_dict())
        assert again.arch == network.arch


@pytest.mark.parametrize("options", [{"size": 36}, {"size": 2}, {"size": 16, "patch": 3}, {"size": 16, "width": 20}])
def test_sizes_and_widths_that_do_not_fit_are_one_line(options: dict[str, int]) -> None:
    for network in (Generator, Discriminator):
        with pytest.raises(UserError, match="another|--image-size|change the width") as error:
            network(**{"classes": 5, "channels": 1, **options})
        assert "\n" not in str(error.value)


def test_a_constant_channel_is_divided_by_1():
    net = build_classifier("convnet:8", channels=3, size=16, classes=5, mean=(0, 0, -1), std=(0.5, 1e-9, 0))
    assert net.std.flatten().tolist() == [0.5, 1.0, 1.0]
    x = torch.rand(2, 3, 16, 16)
    x[:, 2] = -1.0
    assert net(x).isfinite().all()
