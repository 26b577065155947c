"""A loss or gradient that is not finite moves nothing, is counted, and does not go on for ever."""

import copy

import pytest
import torch

from gdd_dist.engines.nonfinite import all_finite, poisoned, step_if
from gdd_dist.training.classifier_fit import sgd, train_step
from gdd_dist.training.optimizers import Adam
from gdd_dist.training.skipped_steps import LIMIT, Diverged, Skips, going_back_once
from sharding.errors import UserError


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_that_is_not_finite_is_found_wherever_it_is(value):
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    assert all_finite(net.parameters())  # none yet
    net(torch.ones(1, 3)).sum().backward()
    assert all_finite(net.parameters())
    net[1].bias.grad[1] = value
    assert not all_finite(net.parameters())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_says_so_in_its_gradients(value):
    w = torch.ones(3, requires_grad=True)
    poisoned(w.sum() + value).backward()  # its own gradient would be 1
    assert w.grad.isnan().all()


def test_a_finite_loss_keeps_every_bit_of_its_gradients():
    w = torch.randn(1000, requires_grad=True)
    (one,) = torch.autograd.grad((w**3).mean(), w)
    (two,) = torch.autograd.grad(poisoned((w**3).mean()), w)
    assert one.equal(two)


@pytest.mark.parametrize("before", [0, 1], ids=["the first step", "a later one"])
def test_a_skipped_step_moves_neither_weights_nor_moments(before):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
    plain = copy.deepcopy(net)
    optimizer, skips = sgd(net, 0.1, 0.9, 0.01), Skips()
    good, bad, y = torch.randn(3, 1, 2, 2), torch.full((3, 1, 2, 2), float("inf")), torch.tensor([0, 1, 0])

    def state():
        return [t.clone() for t in (*net.parameters(), *(s["momentum_buffer"] for s in optimizer.state.values()))]

    for _ in range(before):
        skips.note(train_step(net, optimizer, good, y, 0.1, "float32"))
    kept = state()
    skips.note(train_step(net, optimizer, bad, y, 0.1, "float32"))
    assert (skips.total, skips.in_a_row) == (1, 1)
    assert all(a.equal(b) for a, b in zip(state(), kept, strict=True))
    skips.note(train_step(net, optimizer, good, y, 0.1, "float32"))
    assert (skips.total, skips.in_a_row) == (1, 0)
    assert not kept[0].equal(state()[0])
    other = sgd(plain, 0.1, 0.9, 0.01)
    for _ in range(before + 1):
        train_step(plain, other, good, y, 0.1, "float32")
    assert all(a.equal(b) for a, b in zip(net.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize("fused", [False, True])
def test_adam_skips_its_count_of_steps_too(fused):
    w = torch.ones(3, requires_grad=True)
    optimizer = Adam([w], lr=0.1, betas=(0.0, 0.99), fused=fused)
    for value in (1.0, float("nan"), -1.0):
        w.grad = torch.full((3,), value)
        step_if(all_finite([w]), optimizer)
    assert float(optimizer.state[w]["step"]) == 2
    assert w.isfinite().all()


MOVED, SKIPPED = torch.tensor(True), torch.tensor(False)


def test_steps_skipped_in_a_row_end_the_attempt_and_single_ones_do_not():
    skips = Skips()
    for _ in range(3 * LIMIT):
        skips.note(SKIPPED)
        skips.note(MOVED)
    assert skips.total == 3 * LIMIT
    for _ in range(LIMIT - 1):
        skips.note(SKIPPED)
    with pytest.raises(Diverged):
        skips.note(SKIPPED)
    again = Skips()
    again.load_state_dict(skips.state_dict())
    assert again.state_dict() == skips.state_dict()


class OfDevice:
    """A bool scalar on a device: notes when the host reads it."""

    def __init__(self, moved, log, name):
        self.moved, self.log, self.name, self.device = moved, log, name, torch.device("cuda")

    def __bool__(self):
        self.log.append(self.name)
        return self.moved


@pytest.fixture
def late(monkeypatch):
    """Notes a step of a device; the names of what was read."""
    monkeypatch.setattr("gdd_dist.training.skipped_steps.on_its_way", lambda moved: moved.__bool__)
    log = []
    return lambda skips, moved, name: skips.note(OfDevice(moved, log, name)) or list(log)


def test_on_a_device_a_step_is_read_when_the_next_is_noted_and_each_once(late):
    skips = Skips()
    assert late(skips, True, 0) == []
    assert late(skips, False, 1) == [0]
    assert skips.line("gan", 2) == ""  # nobody knows yet
    assert late(skips, True, 2) == [0, 1]
    assert skips.line("gan", 3) == "gan: step 1 skipped on all ranks, its loss or gradient is not finite (1 in all)"
    assert skips.line("gan", 3) == ""
    skips.settle()
    assert late(skips, True, 3) == [0, 1, 2]


def test_what_is_saved_or_reported_counts_the_last_step_too(late):
    skips = Skips()
    late(skips, False, 0)
    assert skips.state_dict() == {"total": 1, "in_a_row": 1, "draw": 0}
    late(skips, False, 1)
    assert (skips.total, skips.in_a_row) == (2, 2)
    assert skips.line("gan", 2) == ""  # it follows one of which nothing was said in time
    late(skips, True, 2)
    assert skips.in_a_row == 0


def test_on_a_device_the_attempt_ends_one_step_later_or_at_the_end(late):
    for last in (lambda s: late(s, True, "after"), Skips.settle, lambda s: s.total):
        skips = Skips()
        for step in range(LIMIT):
            late(skips, False, step)
        with pytest.raises(Diverged):
            last(skips)


def diverging(draws):
    def attempt(draw):
        if draw in draws:
            raise Diverged(draw)
        return draw

    return attempt


def test_a_loop_goes_back_once_with_another_draw_and_then_stops():
    said = []
    assert going_back_once("gan", diverging([]), "lower it", said.append) == 0
    assert said == []
    assert going_back_once("gan", diverging([0]), "lower it", said.append) == 1
    assert said == [
        "gan: 10 steps in a row had a loss or gradient that is not finite; "
        "going back to the last checkpoint, with different noise"
    ]
    with pytest.raises(UserError, match="gan: 10 steps in a row .* also after going back to a checkpoint; lower it"):
        going_back_once("gan", diverging([0, 1]), "lower it", said.append)


def test_a_loop_that_had_gone_back_before_it_was_interrupted_does_not_go_back_again():
    def attempt(_draw):
        raise Diverged(1)

    with pytest.raises(UserError, match="after going back"):
        going_back_once("gan", attempt, "lower it", lambda line: pytest.fail(line))


def test_another_draw_is_another_seed_and_the_first_is_the_run_s_own():
    skips = Skips()
    assert skips.seed(7) == 7
    skips.draw = 1
    assert skips.seed(7) != 7


def test_the_largest_number_is_finite():
    w = torch.zeros(3, requires_grad=True)
    w.grad = torch.full((3,), -torch.finfo(torch.float32).max)
    assert all_finite([w])


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_is_torchs_own(nesterov):
    """Fused, but the same to rounding over steps, with a learning rate that changes."""
    nets = [torch.nn.Linear(7, 5), torch.nn.Linear(7, 5)]
    nets[1].load_state_dict(nets[0].state_dict())
    ours = sgd(nets[0], 0.1, 0.9, 0.01, nesterov)
    plain = torch.optim.SGD(nets[1].parameters(), 0.1, 0.9, weight_decay=0.01, nesterov=nesterov, foreach=False)
    x, y, skips = torch.randn(10, 4, 7), torch.randint(5, (10, 4)), Skips()
    for k in range(10):
        for net, optimizer in zip(nets, (ours, plain), strict=True):
            skips.note(train_step(net, optimizer, x[k], y[k], 0.1 / (k + 1), "float32"))
    for one, two in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-5)
