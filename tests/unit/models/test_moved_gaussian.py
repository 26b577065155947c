"""The Gaussians in training: the start, what a turn and a shift do, and the file that they become."""

import pytest
import torch

from gdd_dist.models.gaussian import LinearGenerator, lower, pack, unpack
from gdd_dist.models.moved_gaussian import SHIFT, MovedGaussian

C, K, SIDE = 3, 6, 4
PIXELS = 3 * SIDE**2


def gaussian(spread: float = 0.8, dtype: str = "float32") -> LinearGenerator:
    g = torch.Generator().manual_seed(0)
    net = LinearGenerator(classes=C, channels=3, size=SIDE, latent=K, spread=spread, dtype=dtype)
    roots = torch.randn(C, K, K, generator=g).tril() * 0.1 + torch.eye(K) * 0.5
    net.load_state_dict(
        {
            "mean": torch.randn(PIXELS, generator=g) * 0.1,
            "basis": torch.linalg.qr(torch.randn(PIXELS, K, generator=g)).Q.T,
            "class_means": torch.randn(C, K, generator=g) * 0.1,
            "roots": torch.stack([pack(root, lower(K)) for root in roots]),
        }
    )
    return net


def moved(net: LinearGenerator) -> MovedGaussian:
    g, found = torch.Generator().manual_seed(1), MovedGaussian(net)
    with torch.no_grad():
        found.turn.copy_(torch.randn(C, K, K, generator=g) * 0.3)
        found.shift.copy_(torch.randn(C, K, generator=g) * 0.02)
    return found


@pytest.fixture
def draws() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(50, K, generator=torch.Generator().manual_seed(2)), torch.arange(50) * 7 % C


def test_at_first_it_draws_what_the_gaussian_draws(draws) -> None:
    net = gaussian()
    assert MovedGaussian(net)(*draws).equal(net(*draws))


def test_a_latent_is_turned_and_shifted_by_its_class(draws) -> None:
    net, (z, labels) = gaussian(), draws
    found = moved(net)
    expected = torch.stack(
        [row + found.turn[y] @ row + SHIFT * found.shift[y] for row, y in zip(z, labels.tolist(), strict=True)]
    )
    torch.testing.assert_close(found(z, labels), net(expected, labels))


@pytest.mark.parametrize("spread", [0.8, 1.0])
def test_the_file_has_the_same_gaussians(spread) -> None:
    found = moved(gaussian(spread))
    folded = found.folded()
    assert folded.arch["spread"] == 1.0
    for y in range(C):
        old = spread * unpack(found.linear.roots[y], lower(K), K).double()
        root, new = old @ (torch.eye(K) + found.turn[y].double()), unpack(folded.roots[y], lower(K), K).double()
        torch.testing.assert_close(new @ new.T, root @ root.T, atol=1e-6, rtol=1e-5)
        assert (new.diagonal() > 0).all()
        shift = folded.class_means[y] - found.linear.class_means[y]
        torch.testing.assert_close(shift.double(), SHIFT * old @ found.shift[y].double(), atol=1e-6, rtol=1e-5)


def test_unmoved_gaussians_become_themselves() -> None:
    net = gaussian(1.0)
    folded = MovedGaussian(net).folded()
    for name, value in net.state_dict().items():
        torch.testing.assert_close(folded.state_dict()[name], value, atol=1e-6, rtol=1e-5)


def test_a_file_of_half_precision_stays_one() -> None:
    folded = moved(gaussian(dtype="float16")).folded()
    assert folded.roots.dtype == folded.basis.dtype == torch.float16


def test_only_turns_and_shifts_are_trained_and_a_clamped_pixel_has_a_gradient(draws) -> None:
    net = gaussian()
    net.mean += 5.0
    found = moved(net)
    images = found(*draws)
    assert images.max() == 1.0
    images.sum().backward()
    assert {name for name, p in found.named_parameters()} == {"turn", "shift"}
    assert all(p.grad.abs().sum() > 0 for p in found.parameters())
