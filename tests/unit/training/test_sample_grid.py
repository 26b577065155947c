"""Grids of images."""

import numpy as np
import pytest
import torch
from torchvision.utils import make_grid

from gdd_dist.training.sample_grid import enlarged_grid, laid_out


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("count", "columns"), [(1, 4), (3, 4), (4, 4), (7, 3), (20, 10)])
def test_a_grid_is_that_of_torchvision(channels, count, columns):
    images = np.random.default_rng(0).integers(0, 256, (count, channels, 5, 6), dtype=np.uint8)
    expected = make_grid(torch.from_numpy(images), nrow=columns, padding=1).permute(1, 2, 0).numpy()
    found = laid_out(images, columns)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, expected)


def test_small_images_are_enlarged():
    assert enlarged_grid(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), 2).shape == (34, 67, 3)
