import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharding.errors import UserError
from sharding.sizes import parse_size
from sharding.splits import apportion, deal, stratified

COUNTS = st.lists(st.integers(2, 200), min_size=1, max_size=12).map(lambda counts: np.array(counts, np.int64))


@given(COUNTS, st.floats(0.001, 0.999))
def test_a_cut_gives_and_leaves_every_class_something_in_proportion(counts, fraction):
    total = round(fraction * int(counts.sum()))
    shares = apportion(counts, total)
    assert (shares >= 1).all()
    assert (shares <= counts - 1).all()
    quotas = counts * total / counts.sum()
    assert (np.abs(shares - np.clip(quotas, 1, counts - 1)) <= 1).all()


@given(st.lists(st.integers(40, 200), min_size=1, max_size=12), st.floats(0.05, 0.9))
def test_a_cut_of_large_classes_is_exact(counts, fraction):
    total = round(fraction * sum(counts))
    assert apportion(np.array(counts, np.int64), total).sum() == total


@given(st.lists(st.integers(0, 6), min_size=1, max_size=120), st.integers(1, 12), st.integers(0, 5))
def test_dealing_gives_each_sample_once_and_each_shard_the_same_mix(labels, shards, seed):
    labels = np.array(labels)
    shards = min(shards, len(labels))
    dealt = deal(labels, shards, seed=seed, split="train")
    assert sorted(np.concatenate(dealt).tolist()) == list(range(len(labels)))
    counts = np.stack([np.bincount(labels[rows], minlength=7) for rows in dealt])
    assert (np.ptp(counts, axis=0) <= 1).all()
    assert np.ptp([len(rows) for rows in dealt]) <= 1


def test_shards_are_shuffled_inside():
    labels = np.repeat(np.arange(4), 50)
    (rows,) = deal(labels, 1, seed=0, split="train")
    # In runs of one class there would be 3 changes of class; at random about 150.
    assert np.count_nonzero(np.diff(labels[rows])) > 100


def test_cuts_depend_on_seed_and_purpose_alone():
    labels = np.arange(400) % 4
    first = stratified(labels, 40, seed=0, purpose="val")
    assert (first == stratified(labels, 40, seed=0, purpose="val")).all()
    assert (first != stratified(labels, 40, seed=1, purpose="val")).any()
    assert (first != stratified(labels, 40, seed=0, purpose="test")).any()


def test_a_class_too_small_to_split_is_named():
    with pytest.raises(UserError, match="class b has too few images for both val and train"):
        stratified([0, 0, 1], 1, seed=0, purpose="val", classes=("a", "b"))


@pytest.mark.parametrize(
    ("text", "size"),
    [("64MB", 64_000_000), ("64mib", 64 * 2**20), ("1.5 GB", 1_500_000_000), ("10", 10), ("2KB", 2000)],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MB", "-1MB", "64 parsecs", "1e6", "nan"])
def test_sizes_that_are_none(text):
    with pytest.raises(UserError, match="64MB"):
        parse_size(text)
