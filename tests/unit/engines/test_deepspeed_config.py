"""--deepspeed-config says where things live and how they travel; whatever changes numbers is refused by name."""

import json

import pytest

from gdd_dist.engines import deepspeed_config
from gdd_dist.engines.deepspeed_engine import engine_config
from sharding.errors import UserError


@pytest.fixture
def write(tmp_path):
    def write(value):
        path = tmp_path / "ds.json"
        path.write_text(value if isinstance(value, str) else json.dumps(value))
        return str(path)

    return write


def test_where_and_how_are_let_through(write):
    given = {
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "overlap_comm": True},
        "communication_data_type": "fp32",
        "steps_per_print": 100,
    }
    assert deepspeed_config.read(write(given)) == given
    assert deepspeed_config.read(None) == {}


@pytest.mark.parametrize(
    ("key", "instead"),
    [
        ("train_batch_size", "--gan.batch"),
        ("gradient_accumulation_steps", "--accumulate"),
        ("optimizer", "--gan.lr"),
        ("scheduler", "--gan.lr_final"),
        ("bf16", "--precision"),
        ("fp16", "--precision"),
        ("gradient_clipping", "not clipped"),
        ("zero_optimisation", "did you mean zero_optimization?"),
        ("compression_training", "leave it out"),
    ],
)
def test_what_changes_numbers_is_refused_and_the_setting_named(write, key, instead):
    with pytest.raises(UserError, match=key) as e:
        deepspeed_config.read(write({key: 1}))
    assert instead in str(e.value)


@pytest.mark.parametrize(
    ("zero", "word"),
    [
        ({"zero_quantized_gradients": True}, "zero_quantized_gradients"),
        ({"memory_efficient_linear": True}, "memory_efficient_linear"),
        ({"stage": 4}, "give 0, 1, 2 or 3"),
        ({"stage": "auto"}, "auto"),
        ({"stage": True}, "give 0, 1, 2 or 3"),
        ({"offload_param": {"device": "nvme"}}, "nvme"),
        ([], "not a JSON object"),
    ],
)
def test_zeros_own_keys_are_checked(write, zero, word):
    with pytest.raises(UserError, match=word):
        deepspeed_config.read(write({"zero_optimization": zero}))


@pytest.mark.parametrize("text", ["{", "[]", "3"])
def test_a_file_that_is_no_json_object_is_refused(write, text):
    with pytest.raises(UserError, match="JSON"):
        deepspeed_config.read(write(text))


def test_a_missing_file_is_named():
    with pytest.raises(UserError, match="/nowhere/ds.json"):
        deepspeed_config.read("/nowhere/ds.json")


def test_gradients_that_would_be_rounded_on_their_way_are_refused(write):
    with pytest.raises(UserError, match="communication_data_type"):
        deepspeed_config.read(write({"communication_data_type": "fp16"}))


def test_an_engines_configuration_never_clips_and_keeps_what_was_given():
    config = engine_config({"zero_optimization": {"stage": 2, "reduce_bucket_size": 7}}, 1001, 4)
    assert config["gradient_clipping"] == 0.0
    assert config["gradient_accumulation_steps"] == 4
    assert config["zero_optimization"] == {
        "stage": 2,
        "reduce_bucket_size": 7,
        "allgather_bucket_size": 1024,
        "memory_efficient_linear": False,
    }
    assert engine_config({}, 1000, 1)["zero_optimization"]["stage"] == 1


def test_buckets_are_as_large_as_ddps_but_no_larger_than_the_network():
    sizes = {n: engine_config({}, n, 1)["zero_optimization"]["reduce_bucket_size"] for n in (1000, 10**9)}
    assert sizes == {1000: 1024, 10**9: 25 * 2**20 // 4}


def test_zero_3_reduces_in_the_order_of_the_backward_unless_it_is_told_otherwise():
    def overlaps(**zero):
        return engine_config({"zero_optimization": zero}, 1000, 1)["zero_optimization"].get("overlap_comm")

    assert overlaps(stage=3) is False
    assert overlaps(stage=3, overlap_comm=True) is True
    assert overlaps(stage=2) is None
