"""Forwards without training: cut to what the device likes, which changes no answer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gdd_dist.data.images import to_float
from gdd_dist.data.pixels import CPU_BATCH, forward_size
from gdd_dist.training.classifier_fit import predict
from gdd_dist.training.soft_labels import soft_labels

IMAGES = torch.randint(256, (3 * CPU_BATCH + 7, 1, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.fixture
def net_and_sizes() -> tuple[nn.Module, list[int]]:
    torch.manual_seed(0)
    net, sizes = nn.Sequential(nn.Flatten(), nn.Linear(16, 5)), list[int]()
    net.register_forward_pre_hook(lambda _net, inputs: sizes.append(len(inputs[0])))
    return net, sizes


def test_a_cpu_forwards_few_at_once_and_a_gpu_what_it_is_given() -> None:
    assert [forward_size(torch.device("cpu"), n) for n in (1, CPU_BATCH, 500)] == [1, CPU_BATCH, CPU_BATCH]
    assert forward_size(torch.device("cuda"), 500) == 500


@pytest.mark.parametrize("batch", [20, 50, 500])
def test_predict_answers_every_image_in_its_place(net_and_sizes: tuple[nn.Module, list[int]], batch: int) -> None:
    net, sizes = net_and_sizes
    found = predict(net, lambda i: IMAGES[torch.from_numpy(i)], len(IMAGES), torch.device("cpu"), "float32", batch)
    assert (sum(sizes), max(sizes)) == (len(IMAGES), min(batch, CPU_BATCH))
    torch.testing.assert_close(found, net(to_float(IMAGES, torch.device("cpu"))).detach())


def test_soft_labels_do_not_depend_on_how_they_are_cut(net_and_sizes: tuple[nn.Module, list[int]]) -> None:
    net, sizes = net_and_sizes
    x = to_float(IMAGES, torch.device("cpu"))
    found = soft_labels([net], x, 2.0, "float32")
    assert (sum(sizes), max(sizes)) == (len(IMAGES), CPU_BATCH)
    torch.testing.assert_close(found, (net(x) / 2).softmax(1).detach())
