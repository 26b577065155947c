"""Augmentation is a pure, differentiable, per-sample function of its draws."""

import numpy as np
import pytest
import torch
from torch import Tensor

from gdd_dist.data.augment import AUGMENT_DRAWS, augment

FILL = (-0.1, 0.2, 0.3)


def batch(count: int = 12, channels: int = 3, side: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    images = torch.rand(count, channels, side, side, generator=generator) * 2 - 1
    return images, torch.rand(count, AUGMENT_DRAWS, generator=generator)


def still(count: int = 12) -> Tensor:
    """Draws that leave an image as it is: half strength is identity for colour, the middle shift is zero."""
    return torch.full((count, AUGMENT_DRAWS), 0.5)


def test_same_draws_same_images() -> None:
    images, draws = batch()
    first = augment(images, draws, flip=True, fill=FILL)
    assert torch.equal(first, augment(images.clone(), draws.clone(), flip=True, fill=FILL))
    assert not torch.equal(first, augment(images, 1 - draws, flip=True, fill=FILL))


def test_inputs_are_left_alone() -> None:
    images, draws = batch()
    copies = images.clone(), draws.clone()
    augment(images, draws, flip=True, fill=FILL)
    assert torch.equal(images, copies[0])
    assert torch.equal(draws, copies[1])


@pytest.mark.parametrize("ops", ["color_crop_cutout", "crop", "cutout", "color"])
def test_subset_of_augmented_equals_augmented_subset(ops: str) -> None:
    images, draws = batch()
    whole = augment(images, draws, flip=True, fill=FILL, ops=ops)
    part = torch.tensor([7, 2, 11])
    assert torch.equal(whole[part], augment(images[part], draws[part], flip=True, fill=FILL, ops=ops))


def test_gradients_equal_finite_differences() -> None:
    images, draws = batch(2, 3, 8)
    images = images.double().requires_grad_()
    weights = torch.randn(images.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert torch.autograd.gradcheck(lambda x: (augment(x, draws, flip=True, fill=FILL) * weights).sum(), (images,))
    assert torch.autograd.gradgradcheck(
        lambda x: (augment(x, draws, flip=True, fill=FILL) ** 2 * weights).sum(), (images,), atol=1e-4
    )


@pytest.mark.parametrize("ops", ["crop", "cutout", "crop_cutout"])
def test_a_pixels_gradient_comes_from_one_place(ops: str) -> None:
    """It is one of the gradients above it, bit for bit, or zero. A sum would depend on the order in which a GPU adds."""
    images, draws = batch(200, 1, 8)
    above = torch.rand(images.shape, generator=torch.Generator().manual_seed(2)) + 1
    found = torch.autograd.grad(augment(images.requires_grad_(), draws, flip=True, fill=0.0, ops=ops), images, above)[0]
    for one, other in zip(found, above, strict=True):
        kept = one[one != 0]
        assert torch.isin(kept, other).all()
        assert len(kept.unique()) == len(kept)
    assert (found != 0).float().mean() > 0.5


@pytest.mark.parametrize("ops", ["", "none"])
def test_no_operation_is_identity(ops: str) -> None:
    images, draws = batch()
    assert torch.equal(augment(images, draws, flip=False, fill=FILL, ops=ops), images)


def test_middle_draws_are_identity_for_colour_and_crop() -> None:
    images, _ = batch()
    out = augment(images, still(), flip=False, fill=FILL, ops="color_crop")
    torch.testing.assert_close(out, images, atol=1e-6, rtol=0)


def test_never_flips_unless_asked() -> None:
    images, draws = batch()
    assert torch.equal(augment(images, draws, flip=False, fill=FILL, ops="none"), images)
    for value in (0.0, 0.999):
        draws[:, 7] = value
        plain = augment(images, draws, flip=False, fill=FILL)
        draws[:, 7] = 0.5
        assert torch.equal(plain, augment(images, draws, flip=False, fill=FILL))


def test_flips_half_when_asked() -> None:
    images, draws = batch(400)
    out = augment(images, draws, flip=True, fill=FILL, ops="none")
    flipped = (out == images.flip(3)).all((1, 2, 3))
    assert (flipped | (out == images).all((1, 2, 3))).all()
    assert 0.4 < flipped.float().mean() < 0.6


def test_crop_shifts_by_up_to_an_eighth_and_fills() -> None:
    images, draws = batch(600)
    out = augment(images, draws, flip=False, fill=FILL, ops="crop")
    reach, seen = 2, set()
    padded = torch.tensor(FILL).view(1, 3, 1, 1).expand(600, 3, 20, 20).clone()
    padded[:, :, reach:-reach, reach:-reach] = images
    for index in range(600):
        found = [
            (y, x)
            for y in range(5)
            for x in range(5)
            if torch.equal(out[index], padded[index, :, y : y + 16, x : x + 16])
        ]
        assert len(found) == 1
        seen.add(found[0])
    assert len(seen) == 25


def test_cutout_hides_a_half_size_box_clipped_at_the_border() -> None:
    images, draws = batch(300)
    out = augment(images, draws, flip=False, fill=9.0, ops="cutout")
    hidden = (out == 9.0).all(1)
    assert torch.equal(torch.where(hidden[:, None], images, out), images)
    heights, widths = hidden.any(2).sum(1), hidden.any(1).sum(1)
    assert torch.equal(hidden.sum((1, 2)), heights * widths)
    for lengths in (heights, widths):
        assert set(lengths.tolist()) == {4, 5, 6, 7, 8}


def test_colour_equals_the_formula() -> None:
    images, draws = batch(4)
    x, u = images.double().numpy(), draws.double().numpy()
    for i in range(4):
        y = x[i] + (u[i, 0] - 0.5) * 0.5
        grey = y.mean(0, keepdims=True)
        y = grey + (y - grey) * 2 * u[i, 1]
        y = y.mean() + (y - y.mean()) * (u[i, 2] + 0.5)
        np.testing.assert_allclose(augment(images, draws, flip=False, fill=FILL, ops="color")[i].numpy(), y, atol=1e-5)


def test_one_channel_has_no_saturation() -> None:
    images, draws = batch(5, channels=1)
    first = augment(images, draws, flip=False, fill=-1.0)
    draws[:, 1] = 0.0
    assert torch.equal(first, augment(images, draws, flip=False, fill=-1.0))


def test_largest_draw_stays_in_range() -> None:
    images, _ = batch(2, side=64)
    largest = torch.full((2, AUGMENT_DRAWS), float(np.nextafter(np.float32(1), np.float32(0))))
    for draws in (largest, torch.zeros(2, AUGMENT_DRAWS)):
        assert torch.isfinite(augment(images, draws, flip=True, fill=FILL)).all()


def test_unknown_operation_and_wrong_draws_are_refused() -> None:
    images, draws = batch()
    with pytest.raises(ValueError, match="colour"):
        augment(images, draws, flip=False, fill=FILL, ops="colour")
    with pytest.raises(ValueError, match="draws"):
        augment(images, draws[:3], flip=False, fill=FILL)
