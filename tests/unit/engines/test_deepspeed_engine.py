"""ZeRO 0 to 3 behind the engine: DDP's numbers, states that any engine and any number of ranks go on from."""

import copy
import os

import pytest
import ranks
import torch
import torch.distributed as dist
from test_engines import network, train

from gdd_dist.engines.ddp import DDPEngine
from gdd_dist.engines.deepspeed_engine import DeepSpeedEngine
from gdd_dist.runtime.world import World

EXAMPLE = (torch.zeros(1, 1, 8, 8), torch.zeros(1, dtype=torch.int64))
HALF, LAST = 3, 6


def engine(kind, world, precision="float32", accumulate=1):
    """``kind``: "ddp" or a ZeRO stage; parameters of any size are cut, as large ones would be."""
    net = network()
    optimizer = torch.optim.Adam(net.parameters(), betas=(0.0, 0.99))
    if kind == "ddp":
        return DDPEngine(net, optimizer, world, precision, EXAMPLE, accumulate)
    given = {"zero_optimization": {"stage": kind, "stage3_param_persistence_threshold": 0}}
    return DeepSpeedEngine(net, optimizer, world, precision, EXAMPLE, given, accumulate)


def from_main(world, state):
    """Rank 0's state on all ranks, as a checkpoint file would bring it."""
    box = [copy.deepcopy(state) if world.is_main else None]
    if world.size > 1:
        dist.broadcast_object_list(box, 0)
    return box[0]


def halves(rank, first, second, precision="float32"):
    """Half of the steps under one engine, the rest under another that loads its state; weights at the end, state in between."""
    world = World("cpu").join()
    torch.set_num_threads(1)
    one = engine(first, world, precision)
    losses = train(world, one, 0, HALF)[1]
    state = from_main(world, one.state_dict())
    one.close()
    two = engine(second, world, precision)
    two.load_state_dict(copy.deepcopy(state))
    losses += train(world, two, HALF, LAST)[1]
    found = {"losses": torch.tensor(losses), "weights": two.weights(), "state": state}
    two.close()
    world.close()
    return found


def whole(rank, kind, precision="float32", accumulate=1):
    """All steps under one engine."""
    world = World("cpu").join()
    torch.set_num_threads(1)
    d = engine(kind, world, precision, accumulate)
    losses = train(world, d, 0, LAST, accumulate)[1]
    found = {"losses": torch.tensor(losses), "weights": d.weights()}
    d.close()
    world.close()
    return found


def close(a, b, tolerance):
    return torch.allclose(a, b, rtol=tolerance, atol=0)


@pytest.fixture(scope="module")
def ddp(tmp_path_factory):
    """DDP's losses and weights at two ranks."""
    return ranks.call(tmp_path_factory.mktemp("ddp"), 2, whole, "ddp")[0]


@pytest.mark.parametrize(
    "stage", [pytest.param(0, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.slow), 2, 3]
)
def test_double_backward_under_zero_gives_ddps_losses_and_weights_and_resumes_with_the_same_bits(ddp, tmp_path, stage):
    undisturbed = ranks.call(tmp_path / "whole", 2, whole, stage)
    resumed = ranks.call(tmp_path / "halves", 2, halves, stage, stage)
    assert ddp["losses"].std() > 0.01
    for found in undisturbed:
        assert close(found["losses"], ddp["losses"], 1e-5)
        for name, expected in ddp["weights"].items():
            assert torch.allclose(found["weights"][name], expected, atol=1e-5), name
    for one, other in zip(undisturbed, resumed, strict=True):
        assert one["losses"].equal(other["losses"])
        assert all(other["weights"][k].equal(v) for k, v in one["weights"].items())


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_at_four_ranks_too(tmp_path, stage):
    """Where the place of a gradient in its bucket decides on the order of summation."""
    ddp = ranks.call(tmp_path / "ddp", 4, whole, "ddp")[0]
    undisturbed = ranks.call(tmp_path / "whole", 4, whole, stage)
    resumed = ranks.call(tmp_path / "halves", 4, halves, stage, stage)
    for one, other in zip(undisturbed, resumed, strict=True):
        assert close(one["losses"], ddp["losses"], 1e-5)
        assert all(other["weights"][k].equal(v) for k, v in one["weights"].items())


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("ddp", 3),
        (3, "ddp"),
        *(pytest.param(a, b, marks=pytest.mark.slow) for a, b in ((2, 3), (3, 1), (0, "ddp"), ("ddp", 0))),
    ],
)
def test_a_state_goes_on_under_another_engine(ddp, tmp_path, first, second):
    found = ranks.call(tmp_path, 2, halves, first, second)[0]
    assert close(found["losses"], ddp["losses"], 1e-5)


def test_a_state_has_the_layout_of_ddps_whoever_wrote_it(tmp_path):
    one, other = (ranks.call(tmp_path / str(kind), 2, halves, kind, "ddp")[0]["state"] for kind in ("ddp", 3))
    assert one["module"].keys() == other["module"].keys()
    mine, theirs = one["optimizer"], other["optimizer"]
    assert mine["param_groups"][0]["params"] == theirs["param_groups"][0]["params"]
    for i, expected in mine["state"].items():
        assert expected.keys() == theirs["state"][i].keys()
        for key, value in expected.items():
            assert torch.allclose(theirs["state"][i][key], value, atol=1e-6), (i, key)


def from_two_ranks(rank, state, kind):
    world = World("cpu").join()
    torch.set_num_threads(1)
    d = engine(kind, world)
    d.load_state_dict(state)
    losses = train(world, d, HALF, LAST)[1]
    d.close()
    world.close()
    return {"losses": torch.tensor(losses)}


@pytest.mark.parametrize(("kind", "size"), [(2, 1), pytest.param(3, 4, marks=pytest.mark.slow)])
def test_a_state_goes_on_at_another_number_of_ranks(ddp, tmp_path, kind, size):
    state = ranks.call(tmp_path / "two", 2, halves, 3, 3)[0]["state"]
    found = ranks.call(tmp_path / "other", size, from_two_ranks, state, kind)
    for one in found:
        assert close(one["losses"], ddp["losses"][HALF:], 1e-5)


@pytest.mark.parametrize("kind", ["ddp", 3, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 1, 2))])
def test_micro_batches_give_the_whole_batchs_numbers(ddp, tmp_path, kind):
    found = ranks.call(tmp_path, 2, whole, kind, "float32", 2)[0]
    for name, expected in ddp["weights"].items():
        assert torch.allclose(found["weights"][name], expected, atol=1e-4), name


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_autocast_gives_ddps_numbers_overflowing_steps_included(tmp_path, stage, precision):
    """The first scale of fp16, 65,536, overflows here: both skip the same steps."""
    expected = ranks.call(tmp_path / "ddp", 2, whole, "ddp", precision)[0]
    found = ranks.call(tmp_path / "zero", 2, whole, stage, precision)[0]
    assert close(found["losses"], expected["losses"], 1e-3)
    resumed = ranks.call(tmp_path / "halves", 2, halves, stage, "ddp", precision)[0]
    assert close(resumed["losses"], expected["losses"], 1e-3)


def without_launcher(rank, kind):
    """As `python -m gdd_dist.train` starts: none of the launchers' variables is set."""
    for name in (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "TORCHELASTIC_RUN_ID",
    ):
        os.environ.pop(name, None)
    return whole(rank, kind)


def test_one_process_alone_needs_no_launcher(tmp_path):
    found = ranks.call(tmp_path, 1, without_launcher, 3)[0]
    alone = ranks.call(tmp_path / "ddp", 1, without_launcher, "ddp")[0]
    assert close(found["losses"], alone["losses"], 1e-5)
