"""Forwards and training steps: cut to what the device likes, which changes no answer."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gdd_dist.data.images import to_float
from gdd_dist.data.pixels import CPU_BATCH, forward_size
from gdd_dist.steps.teachers import micro_batches
from gdd_dist.training.classifier_fit import predict, sgd, train_step
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


@pytest.mark.parametrize("soft", [False, True])
def test_a_training_step_in_parts_is_that_of_the_whole_batch(
    net_and_sizes: tuple[nn.Module, list[int]], soft: bool
) -> None:
    net, sizes = net_and_sizes
    other = copy.deepcopy(net)
    x, y = to_float(IMAGES, torch.device("cpu")), torch.arange(len(IMAGES)) % 5
    targets = F.one_hot(y, 5) * 0.7 + 0.06 if soft else y
    assert train_step(net, sgd(net, 0.1, 0.9, 0.0), x, targets, 0.1, "float32")
    assert sizes == [CPU_BATCH] * 3 + [7]
    F.cross_entropy(other(x), targets).backward()
    for moved, kept in zip(net.parameters(), other.parameters(), strict=True):
        assert kept.grad is not None
        torch.testing.assert_close(moved.detach(), kept.detach() - 0.1 * kept.grad)


def test_one_part_that_is_not_finite_stops_the_whole_step(net_and_sizes: tuple[nn.Module, list[int]]) -> None:
    net, _ = net_and_sizes
    before = copy.deepcopy(net.state_dict())
    x = to_float(IMAGES, torch.device("cpu"))
    x[0] = float("nan")
    y = torch.zeros(len(x), dtype=torch.int64)
    assert not train_step(net, sgd(net, 0.1, 0.9, 0.0), x, y, 0.1, "float32")
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_batch_normalization_sees_the_whole_batch(net_and_sizes: tuple[nn.Module, list[int]]) -> None:
    net, sizes = net_and_sizes
    whole = nn.Sequential(net, nn.BatchNorm1d(5))
    x, y = to_float(IMAGES, torch.device("cpu")), torch.zeros(len(IMAGES), dtype=torch.int64)
    train_step(whole, sgd(whole, 0.1, 0.9, 0.0), x, y, 0.1, "float32")
    assert sizes == [len(IMAGES)]


@pytest.mark.parametrize(
    ("share", "least", "found"),
    [(64, 1, 2), (128, 1, 4), (32, 1, 1), (8, 1, 1), (128, 8, 8), (48, 1, 2), (97, 1, 1), (100, 1, 4)],
)
def test_a_cpu_splits_a_teachers_batch_into_equal_parts_that_it_likes(share: int, least: int, found: int) -> None:
    assert micro_batches(share, least) == found
