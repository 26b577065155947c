"""The Gaussian of what teachers choose: mean and covariance against numpy, and that choice moves where it should."""

from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from gdd_dist.models.gaussian import LinearGenerator, lower, pack, unpack
from gdd_dist.training import gaussian_refit

K = 3


def linear(spread: float = 0.5) -> LinearGenerator:
    """Two classes, three components of four pixels, no two numbers alike."""
    net = LinearGenerator(classes=2, channels=1, size=2, latent=K, spread=spread)
    rng = np.random.default_rng(0)
    net.basis.copy_(torch.eye(4)[:K])
    net.class_means.copy_(torch.from_numpy(rng.normal(size=(2, K)) * 0.1))
    roots = np.tril(rng.normal(size=(2, K, K))) * 0.1 + np.eye(K) * 0.3
    net.roots.copy_(torch.stack([pack(torch.from_numpy(r).float(), lower(K)) for r in roots]))
    return net


def test_mean_and_covariance_of_what_is_chosen() -> None:
    net = linear()
    z = np.random.default_rng(1).normal(size=(40, K)) + 0.3
    mean, packed = gaussian_refit.moved(net, 1, torch.from_numpy(z))
    root = 0.5 * unpack(net.roots[1], net.places, K).double().numpy()
    codes = z @ root.T
    np.testing.assert_allclose(mean, net.class_means[1].numpy() + codes.mean(0), rtol=1e-6)
    new = unpack(packed, net.places, K).numpy()
    np.testing.assert_allclose(new @ new.T, 0.5 * np.cov(codes.T) + 0.5 * root @ root.T, rtol=1e-6)


class Bright(nn.Module):
    """A teacher that takes bright first pixels for class 1."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        first = images[:, 0, 0, 0]
        return torch.stack([-first, first], 1) * 20


def test_each_class_moves_to_where_the_teachers_see_it_and_spread_stays_positive() -> None:
    world = SimpleNamespace(rank=0, size=1, check_stop=lambda: None, add=lambda values: values)
    config = SimpleNamespace(step_seed=lambda step: 0)
    ctx = SimpleNamespace(world=world, device=torch.device("cpu"), classes=2, config=config, precision="float32")
    net = linear(1.0)
    found = gaussian_refit.refit(ctx, net, [Bright()], 4)  # type: ignore[arg-type]
    assert found.arch["spread"] == 1.0
    dark, bright = (found.class_means - net.class_means)[:, 0].tolist()
    assert dark < -0.1 < 0.1 < bright
    again = gaussian_refit.refit(ctx, net, [Bright()], 4)  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(found.buffers(), again.buffers(), strict=True))
    plain = gaussian_refit.refit(ctx, net, [Bright()], 1)  # type: ignore[arg-type]
    assert (
        float((plain.class_means - net.class_means).abs().max()) < 0.25
    )  # nothing to choose from: only the noise of few draws


def test_as_many_draws_as_are_counted() -> None:
    assert gaussian_refit.draws(linear(), 4) == 4 * 8 * K * 2
