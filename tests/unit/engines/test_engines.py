"""DDP behind the engine: one process's gradients, double backward included, and an exact resume."""

import copy
import io

import pytest
import ranks
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gdd_dist.engines.ddp import DDPEngine
from gdd_dist.engines.precision import autocast, cast_once, resolve_precision
from gdd_dist.models.classifiers import build_classifier
from gdd_dist.models.discriminator import Discriminator
from gdd_dist.runtime.world import World
from gdd_dist.training import losses
from gdd_dist.training.adversaries import image_gradient

BATCH, STEPS = 8, 6
EXAMPLE = (torch.zeros(1, 1, 8, 8), torch.zeros(1, dtype=torch.int64))


def network():
    # With other seeds a unit of the last block may lie on one side of zero in all images. Its bias then has a gradient of rounding
    # alone, and Adam makes a step of any gradient, so that no two orders of summation would end with the same bias.
    torch.manual_seed(1)
    net = Discriminator(classes=3, channels=1, size=8, width=8, blocks=1)
    for p in net.parameters():  # last layers start at zero: gradients should be of some size
        nn.init.normal_(p, std=0.3)
    return net


def engine(world, precision="float32"):
    net = network()
    return DDPEngine(net, torch.optim.Adam(net.parameters(), betas=(0.0, 0.99)), world, precision, EXAMPLE)


def train(world, d, first, last, parts=1):
    """Steps of the relativistic loss with gradient penalties, in micro-batches.

    Returns the gradients of the first of them where DDP keeps them, and the losses of all, means over ranks.
    """
    share = BATCH // world.size
    mine = slice(world.rank * share, (world.rank + 1) * share)
    gradients, values = {}, []
    for step in range(first, last):
        g = torch.Generator().manual_seed(step)
        real, fake = torch.randn(2, BATCH, 1, 8, 8, generator=g)[:, mine]
        labels = torch.randint(3, (BATCH,), generator=g)[mine]
        of_parts = [penalized(d, *part) for part in zip(*(t.chunk(parts) for t in (real, fake, labels)), strict=True)]
        if step == first:
            gradients = {k: p.grad.clone() for k, p in d.module.named_parameters() if p.grad is not None}
        d.step(1e-3)
        assert all(p.grad is None for p in d.module.parameters())
        values.append(world.mean({"loss": torch.stack(of_parts).mean()})["loss"])
    return gradients, values


def penalized(d, real, fake, labels):
    """Backward of one micro-batch, both sides in one forward; its loss."""
    images = torch.cat((real, fake)).requires_grad_()
    scores = d(images, torch.cat((labels, labels)))
    loss = losses.relativistic_discriminator(*scores.chunk(2))
    (of_images,) = torch.autograd.grad(scores.sum(), images, create_graph=True)
    loss = loss + 0.5 * sum(losses.zero_centred_penalty(x) for x in of_images.chunk(2))
    d.backward(loss)
    return loss.detach()


def undisturbed(rank):
    world = World("cpu").join()
    torch.set_num_threads(1)
    d = engine(world)
    gradients, _ = train(world, d, 0, STEPS)
    weights = {k: v.clone() for k, v in d.module.state_dict().items()}
    d.close()
    world.close()
    return {"gradients": gradients, "weights": weights}


def resumed(rank, forget):
    """Half of the steps, a checkpoint, the rest in a fresh engine."""
    world = World("cpu").join()
    d = engine(world)
    train(world, d, 0, STEPS // 2)
    buffer = io.BytesIO()
    torch.save(d.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    d.close()
    d = engine(world)
    if forget:
        state["optimizer"] = d.state_dict()["optimizer"]
    d.load_state_dict(state)
    train(world, d, STEPS // 2, STEPS)
    weights = {k: v.clone() for k, v in d.module.state_dict().items()}
    d.close()
    world.close()
    return {"weights": weights}


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return ranks.call(tmp_path_factory.mktemp("four"), 4, undisturbed)


def test_a_gradient_penalty_at_two_ranks_has_one_processs_gradients(tmp_path):
    alone = undisturbed(0)
    both = ranks.call(tmp_path, 2, undisturbed)
    assert alone["gradients"].keys() == both[0]["gradients"].keys()
    for name, expected in alone["gradients"].items():
        assert expected.abs().max() > 0, name
        for found in both:
            assert torch.allclose(found["gradients"][name], expected, rtol=1e-5, atol=1e-6), name
    for name, expected in alone["weights"].items():
        assert torch.allclose(both[0]["weights"][name], expected, atol=1e-4), name


def test_all_ranks_hold_the_same_weights(four):
    for other in four[1:]:
        assert all(other["weights"][k].equal(v) for k, v in four[0]["weights"].items())


def test_a_resumed_engine_ends_with_the_same_bits_at_four_ranks(four, tmp_path):
    found = ranks.call(tmp_path, 4, resumed, False)
    for rank in range(4):
        assert all(found[rank]["weights"][k].equal(v) for k, v in four[rank]["weights"].items())


@pytest.mark.parametrize("bad", [False, True])
def test_a_fused_optimizer_stays_fused_whatever_wrote_the_state_it_loads(bad):
    net = network()
    d = DDPEngine(net, torch.optim.Adam(net.parameters(), fused=True), World("cpu"), "float32", EXAMPLE)
    torch.set_num_threads(1)
    other = engine(World("cpu"))
    train(World("cpu"), other, 0, 1)
    d.load_state_dict(copy.deepcopy(other.state_dict()))
    before = d.weights()
    for p in net.parameters():
        p.grad = torch.full_like(p, float("nan") if bad else 1e-3)
    assert bool(d.step(1e-3)) == (not bad)
    assert all(p.grad is None for p in net.parameters())
    assert all(before[k].equal(v) for k, v in d.weights().items()) == bad
    assert {float(s["step"]) for s in d.state_dict()["optimizer"]["state"].values()} == {1.0 if bad else 2.0}


def test_without_the_optimizers_state_it_would_not(four, tmp_path):
    found = ranks.call(tmp_path, 4, resumed, True)
    assert not all(found[0]["weights"][k].equal(v) for k, v in four[0]["weights"].items())


def test_image_gradient_gives_the_images_gradient_and_touches_no_weight():
    net = nn.Linear(4, 1)
    images = torch.randn(3, 4, requires_grad=True)
    value, _, gradient = image_gradient(lambda x: (net(x).square().sum(), {}), images)
    expected = (2 * net(images).detach()) * net.weight.detach()
    assert torch.allclose(gradient, expected)
    assert value.item() == pytest.approx(net(images).square().sum().item())
    assert not value.requires_grad
    assert not gradient.requires_grad
    assert net.weight.grad is None
    assert images.grad is None


def test_sending_the_image_gradient_back_is_the_whole_chain():
    torch.manual_seed(0)
    g, f = nn.Linear(2, 4), nn.Linear(4, 1)
    z = torch.randn(5, 2)
    f(g(z)).square().mean().backward()
    expected = g.weight.grad.clone()
    g.zero_grad()
    fake = g(z)
    _, _, gradient = image_gradient(lambda x: (f(x).square().mean(), {}), fake)
    (fake * gradient).sum().backward()
    assert torch.allclose(g.weight.grad, expected)


def test_precision_auto_becomes_what_the_hardware_computes_in():
    cpu = torch.device("cpu")
    assert resolve_precision("auto", cpu) in ("float32", "bf16")
    for precision in ("float32", "tf32", "bf16", "fp16"):
        assert resolve_precision(precision, cpu) == precision


def test_autocast_computes_in_bf16_over_float32_weights():
    net, x = nn.Linear(4, 4), torch.randn(2, 4)
    with autocast(torch.device("cpu"), "bf16"):
        assert net(x).dtype == torch.bfloat16
    for precision in ("float32", "tf32"):
        with autocast(torch.device("cpu"), precision):
            assert net(x).dtype == torch.float32
    assert net.weight.dtype == torch.float32


@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16", "fp16"])
@pytest.mark.parametrize("name", ["convnet:8", "resnet10:8"])
def test_weights_that_are_cast_once_give_the_bits_of_those_cast_at_each_forward(name, precision):
    net = build_classifier(name, channels=3, size=16, classes=5, mean=[0.1] * 3, std=[0.5] * 3).eval()
    net.requires_grad_(False)
    x, casts = torch.randn(4, 3, 16, 16, requires_grad=True), []
    for module in (net, cast_once(copy.deepcopy(net), precision)):
        with autocast(x.device, precision), Dispatched() as seen:
            answer = module(x)
        casts.append(sum("_to_copy" in str(func) for func in seen.funcs))
        (gradient,) = torch.autograd.grad(answer.float().square().sum(), x)
        if module is net:
            expected = answer, gradient
    assert torch.equal(answer, expected[0])
    assert torch.equal(gradient, expected[1])
    weights = sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in net.modules())
    assert casts[0] - casts[1] >= (weights if precision in ("bf16", "fp16") else 0)


class Dispatched(TorchDispatchMode):
    """The operations that are called inside."""

    def __init__(self):
        super().__init__()
        self.funcs = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.funcs.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_an_engines_answer_is_float32(precision):
    d = engine(World("cpu"), precision)
    torch.set_num_threads(1)
    out = d(torch.randn(2, 1, 8, 8), torch.tensor([0, 1]))
    assert out.dtype == torch.float32
