"""Our optimizers are torch's, bit by bit."""

import copy

import pytest
import torch

from gdd_dist.training import optimizers

SETTINGS = {"SGD": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True}, "Adam": {"betas": (0.0, 0.99)}}


def steps(net, optimizer, images, count):
    for _ in range(count):
        optimizer.zero_grad(set_to_none=True)
        net(images).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("name", SETTINGS)
def test_same_numbers_and_interchangeable_state(name):
    torch.manual_seed(0)
    net, images = torch.nn.Linear(5, 3), torch.randn(4, 5)
    other = copy.deepcopy(net)
    mine = getattr(optimizers, name)(net.parameters(), **SETTINGS[name])
    theirs = getattr(torch.optim, name)(other.parameters(), **SETTINGS[name])
    assert isinstance(mine, type(theirs))
    steps(net, mine, images, 3)
    steps(other, theirs, images, 3)
    again = getattr(optimizers, name)(net.parameters(), **SETTINGS[name])
    again.load_state_dict(copy.deepcopy(theirs.state_dict()))
    steps(net, again, images, 2)
    steps(other, theirs, images, 2)
    assert torch.equal(net.weight, other.weight)
    assert net.weight.grad is not None
    assert not net.weight.isnan().any()
