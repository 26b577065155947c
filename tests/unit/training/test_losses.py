"""Formulas against independent numpy in float64, gradients against finite differences of that numpy."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from gdd_dist.config.settings import PAIR_LOSSES
from gdd_dist.training import losses

Array = NDArray[np.float64]


def np_softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return np.asarray(e / e.sum(-1, keepdims=True))


def np_standardize(x: Array) -> Array:
    mean = x.mean(-1, keepdims=True)
    std = np.sqrt(((x - mean) ** 2).sum(-1, keepdims=True) / (x.shape[-1] - 1))
    return np.asarray((x - mean) / (std + 1e-7))


def np_kd(real: Array, fake: Array, temperature: float) -> float:
    total = 0.0
    for r, f in zip(real, fake, strict=True):
        p, q = np_softmax(r / temperature), np_softmax(f / temperature)
        total += sum(pi * (np.log(pi) - np.log(qi)) for pi, qi in zip(p, q, strict=True))
    return temperature**2 * total / len(real)


def np_skd(real: Array, fake: Array, temperature: float) -> float:
    return np_kd(np_standardize(real), np_standardize(fake), temperature)


def np_dim(real: Array, fake: Array) -> float:
    return float(((np.log(np_softmax(real)) - np.log(np_softmax(fake))) ** 2).mean())


def np_mean_logit(class_mean: Array, fake: Array) -> float:
    total = 0.0
    for mu, group in zip(class_mean, fake, strict=True):
        n = len(group)
        value = ((mu - group.mean(0)) ** 2).sum()
        if n > 1:
            value -= (((group - group.mean(0)) ** 2).sum(0) / (n - 1)).sum() / n
        total += value
    return total / len(fake)


def arrays(*shapes: tuple[int, ...]) -> list[Array]:
    rng = np.random.default_rng(3)
    return [rng.normal(0.5, 3.0, shape) for shape in shapes]


def finite_differences(function: Callable[[Array], float], at: Array, step: float = 1e-6) -> Array:
    gradient = np.zeros_like(at)
    for index in np.ndindex(at.shape):
        shift = np.zeros_like(at)
        shift[index] = step
        gradient[index] = (function(at + shift) - function(at - shift)) / (2 * step)
    return gradient


REAL, FAKE = arrays((6, 10), (6, 10))
MEAN, GROUPS = arrays((3, 10), (3, 4, 10))
ONE_EACH = GROUPS[:, :1]

CASES: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[Array], float], Array]] = {
    "skd-1": (lambda f: losses.skd(torch.tensor(REAL), f, 1.0), lambda f: np_skd(REAL, f, 1.0), FAKE),
    "skd-2": (lambda f: losses.skd(torch.tensor(REAL), f, 2.0), lambda f: np_skd(REAL, f, 2.0), FAKE),
    "skd-4": (lambda f: losses.skd(torch.tensor(REAL), f, 4.0), lambda f: np_skd(REAL, f, 4.0), FAKE),
    "kd-2": (lambda f: losses.kd(torch.tensor(REAL), f, 2.0), lambda f: np_kd(REAL, f, 2.0), FAKE),
    "dim": (lambda f: losses.dim(torch.tensor(REAL), f), lambda f: np_dim(REAL, f), FAKE),
    "mean": (lambda f: losses.mean_logit(torch.tensor(MEAN), f), lambda f: np_mean_logit(MEAN, f), GROUPS),
    "mean-1": (lambda f: losses.mean_logit(torch.tensor(MEAN), f), lambda f: np_mean_logit(MEAN, f), ONE_EACH),
}


@pytest.mark.parametrize("name", CASES)
def test_value_equals_numpy(name: str) -> None:
    ours, reference, at = CASES[name]
    assert ours(torch.tensor(at)).item() == pytest.approx(reference(at), rel=2e-5)


@pytest.mark.parametrize("name", CASES)
def test_gradient_equals_finite_differences(name: str) -> None:
    ours, reference, at = CASES[name]
    fake = torch.tensor(at, requires_grad=True)
    (gradient,) = torch.autograd.grad(ours(fake), fake)
    np.testing.assert_allclose(gradient.numpy(), finite_differences(reference, at), rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_computes_in_float32_whatever_the_dtype(name: str, dtype: torch.dtype) -> None:
    ours, _, at = CASES[name]
    rounded = torch.tensor(at).to(dtype)
    assert ours(rounded).dtype == torch.float32
    assert ours(rounded).item() == ours(rounded.float()).item()


def test_standardize_equals_numpy_with_unbiased_std() -> None:
    z = losses.standardize(torch.tensor(REAL))
    np.testing.assert_allclose(z.numpy(), np_standardize(REAL), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(z.std(-1).numpy(), 1.0, rtol=1e-5)


def test_skd_is_blind_to_shift_and_scale_where_kd_is_not() -> None:
    real, fake = torch.tensor(REAL), torch.tensor(FAKE)
    moved = 3.0 * fake + 7.0
    assert losses.skd(real, moved, 2.0).item() == pytest.approx(losses.skd(real, fake, 2.0).item(), rel=1e-4)
    assert abs(losses.kd(real, moved, 2.0).item() - losses.kd(real, fake, 2.0).item()) > 0.1


def test_equal_logits_cost_nothing() -> None:
    real = torch.tensor(REAL)
    for loss in (losses.skd(real, real, 2.0), losses.kd(real, real, 2.0), losses.dim(real, real)):
        assert loss.item() == pytest.approx(0.0, abs=1e-6)


def test_constant_logits_stay_finite() -> None:
    fake = torch.zeros(2, 10, requires_grad=True)
    loss = losses.skd(torch.tensor(REAL[:2]), fake, 2.0)
    (gradient,) = torch.autograd.grad(loss, fake)
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()


def test_mean_logit_is_unbiased() -> None:
    # A right generator: members are drawn around the class mean, so the expected distance is zero.
    rng = np.random.default_rng(0)
    mean = rng.normal(size=(20_000, 10))
    groups = mean[:, None] + rng.normal(scale=2.0, size=(20_000, 4, 10))
    corrected = losses.mean_logit(torch.tensor(mean), torch.tensor(groups)).item()
    assert abs(corrected) < 0.15  # uncorrected: 10 * 4 / 4 = 10
    assert losses.mean_logit(torch.tensor(mean), torch.tensor(groups[:, :1])).item() == pytest.approx(40.0, rel=0.02)


def test_relativistic_losses_pair_scores() -> None:
    real, fake = arrays((7,), (7,))
    generator = losses.relativistic_generator(torch.tensor(real), torch.tensor(fake)).item()
    discriminator = losses.relativistic_discriminator(torch.tensor(real), torch.tensor(fake)).item()
    assert generator == pytest.approx(np.log1p(np.exp(-(fake - real))).mean(), rel=1e-5)
    assert discriminator == pytest.approx(np.log1p(np.exp(-(real - fake))).mean(), rel=1e-5)


def test_penalty_sums_over_pixels_and_averages_over_the_batch() -> None:
    (gradients,) = arrays((5, 3, 4, 4))
    expected = np.mean([(g**2).sum() for g in gradients])
    assert losses.zero_centred_penalty(torch.tensor(gradients)).item() == pytest.approx(expected, rel=1e-5)


def test_mean_features_are_compared_as_a_share_of_their_variance() -> None:
    draw = np.random.default_rng(0)
    mean, fake, variance = draw.normal(size=(2, 5)), draw.normal(size=(2, 4, 5)), 3.0
    apart = ((mean - fake.mean(1)) ** 2 - fake.var(1, ddof=1) / 4).sum(1).mean() / variance
    found = losses.mean_feature(torch.from_numpy(mean), torch.from_numpy(fake), torch.tensor(variance))
    assert float(found) == pytest.approx(apart, rel=1e-5)


def test_every_pair_loss_is_a_setting_with_its_formula() -> None:
    assert list(losses.PAIR) == list(PAIR_LOSSES)
