"""The order of samples and all noise are pure functions (design 5.1, 5.2)."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gdd_dist.data.noise import normal, permutation, philox, uniform
from gdd_dist.data.order import Order, Recent, balanced_rows, dealt, default_streams

KNOWN_ANSWERS = [  # Random123's kat_vectors for philox4x32 10
    ([0] * 4, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, (0xFFFFFFFF, 0xFFFFFFFF), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        (0xA4093822, 0x299F31D0),
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(counter, key, expected):
    assert philox(np.array(counter, dtype=np.uint32), key).tolist() == expected


def test_noise_golden_values():
    slot = np.array([5])
    assert uniform(0, "gan/z", 3, slot, 3).tolist() == [[0.484255313873291, 0.10808688402175903, 0.4890323281288147]]
    assert np.allclose(normal(0, "gan/z", 3, slot, 3), [[-1.2014198303222656, -1.9562042951583862, 0.0829230546951294]])
    assert permutation(0, "p", 1, 6).tolist() == [5, 2, 3, 0, 4, 1]
    assert Order((7, 9), 4, 2, 0).batch(5).tolist() == [4, 2, 12, 14]


def test_order_golden_values_over_windows_shards_and_epochs():
    order = Order((70, 90, 41, 300), 24, 8, 3, window=16)
    found = np.concatenate([order.batch(step) for step in range(60)])
    assert hashlib.sha256(found.astype("<i8").tobytes()).hexdigest()[:16] == "9c9b11b7529869ad"


@st.composite
def orders(draw):
    streams = draw(st.sampled_from([1, 2, 4, 8, 12]))
    batch = streams * draw(st.integers(1, 4))
    shards = draw(st.lists(st.integers(1, 60), min_size=1, max_size=9))
    if sum(shards) // streams * streams < batch or sum(shards) // streams // (batch // streams) < 1:
        shards.append(batch + streams)
    return Order(tuple(shards), batch, streams, draw(st.integers(0, 5)), window=draw(st.sampled_from([3, 16, 10_000])))


@settings(max_examples=60, deadline=None)
@given(orders(), st.integers(0, 30))
def test_any_world_size_that_divides_the_streams_sees_the_same_global_batch(order, step):
    whole = order.batch(step)
    for world in [w for w in range(1, order.streams + 1) if order.streams % w == 0]:
        parts = [order.batch(step, rank, world) for rank in range(world)]
        assert len({len(p) for p in parts}) == 1
        assert np.array_equal(np.concatenate(parts), whole)


@settings(max_examples=60, deadline=None)
@given(orders(), st.integers(0, 3))
def test_every_sample_once_an_epoch_up_to_the_stated_remainder(order, epoch):
    first = epoch * order.steps_per_epoch
    seen = np.concatenate([order.batch(s) for s in range(first, first + order.steps_per_epoch)])
    assert len(np.unique(seen)) == len(seen) == order.steps_per_epoch * order.batch_size
    assert seen.min() >= 0
    assert seen.max() < order.samples
    assert order.samples - len(seen) < order.batch_size + order.streams


def test_a_batch_is_the_callers_own():
    order = Order((50, 50), 10, 10, 0)
    for rank, world in ((0, 1), (3, 10)):
        first = order.batch(0, rank, world)
        kept = first.copy()
        first[:] = -1
        assert np.array_equal(order.batch(0, rank, world), kept)


@settings(max_examples=30, deadline=None)
@given(orders(), st.integers(0, 40))
def test_resume_at_any_step_equals_the_uninterrupted_order(order, step):
    uninterrupted = [order.batch(s) for s in range(step + 1)]
    again = Order(order.shard_samples, order.batch_size, order.streams, order.seed, window=order.window)
    assert np.array_equal(again.batch(step), uninterrupted[-1])


def test_a_world_that_does_not_divide_the_batch_is_refused():
    with pytest.raises(ValueError, match="3 ranks do not divide a batch of 8"):
        Order((100,), 8, 8, 0).batch(0, 0, 3)


@pytest.mark.parametrize("world", [3, 6, 8, 12, 24, 48])
def test_more_ranks_than_streams_share_one_and_see_the_same_global_batch(world):
    order = Order((500, 300), 48, 8, 0)
    for step in (0, 5, 17):
        parts = [order.batch(step, rank, world) for rank in range(world)]
        assert {len(p) for p in parts} == {48 // world}
        assert np.array_equal(np.concatenate(parts), order.batch(step))


def test_epochs_differ_and_so_do_seeds():
    a = Order((50, 50), 10, 10, 0)
    assert not np.array_equal(a.batch(0), a.batch(a.steps_per_epoch))
    assert not np.array_equal(a.batch(0), Order((50, 50), 10, 10, 1).batch(0))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**31),
    st.integers(0, 2**40),
    st.lists(st.integers(0, 2**40), min_size=1, max_size=9),
    st.integers(1, 9),
)
def test_a_slots_noise_does_not_depend_on_the_other_slots(seed, step, slots, n):
    slots = np.array(slots)
    for draw in (uniform, normal):
        whole = draw(seed, "p", step, slots, n)
        assert whole.dtype == np.float32
        assert whole.shape == (len(slots), n)
        for i in range(len(slots)):
            assert np.array_equal(draw(seed, "p", step, slots[i : i + 1], n)[0], whole[i])


def test_noise_has_the_distribution_it_claims():
    u, z = uniform(0, "u", 0, np.arange(20_000), 4), normal(0, "z", 0, np.arange(20_000), 4)
    assert u.min() >= 0
    assert u.max() < 1
    assert abs(u.mean() - 0.5) < 0.005
    assert abs(u.var() - 1 / 12) < 0.002
    assert abs(z.mean()) < 0.01
    assert abs(z.var() - 1) < 0.02
    assert abs(np.corrcoef(z.T) - np.eye(4)).max() < 0.02
    assert abs(np.corrcoef(u[:-1, 0], u[1:, 0])[0, 1]) < 0.02


def test_purposes_steps_and_seeds_are_independent_streams():
    slots = np.arange(8)
    draws = [uniform(s, p, t, slots, 4).tobytes() for s in (0, 1) for p in ("a", "b") for t in (0, 1, 2**32)]
    assert len(set(draws)) == len(draws)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 20), st.integers(0, 100), st.integers(1, 50))
def test_dealt_holds_every_number_once_per_block(n, start, count):
    sequence = dealt(0, "classes", np.arange(n * (start + count)), n).reshape(-1, n)
    assert (np.sort(sequence, axis=1) == np.arange(n)).all()
    assert np.array_equal(
        dealt(0, "classes", np.arange(start, start + count), n), sequence.ravel()[start : start + count]
    )


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 40),
    st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(1, 9), st.lists(st.integers(0, 50), max_size=9)), max_size=12
    ),
)
def test_dealt_from_kept_permutations_is_dealt(most, asked):
    recent = Recent(most)
    for purpose, n, positions in asked:
        at = np.array(positions, np.int64)
        assert np.array_equal(dealt(3, purpose, at, n, recent), dealt(3, purpose, at, n))
        assert sum(map(len, recent._kept.values())) == recent._numbers <= most


def test_recent_draws_a_permutation_once_while_it_has_room_and_hands_out_none_that_can_be_changed(monkeypatch):
    drawn = []
    monkeypatch.setattr("gdd_dist.data.order.permutation", lambda *of: drawn.append(of[1]) or permutation(*of))
    recent = Recent(20)
    for purpose in "aababcab":  # two of 10 numbers have room
        recent(0, purpose, 0, 10)
    assert drawn == ["a", "b", "c", "a", "b"]
    with pytest.raises(ValueError, match="read-only"):
        recent(0, "a", 0, 10)[0] = 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=80))
def test_balanced_rows_draw_every_class_equally_often(labels):
    labels = np.array(labels)
    rows = balanced_rows(labels, 5)
    counts = np.bincount(labels, minlength=5)
    drawn = np.bincount(labels if rows is None else labels[rows], minlength=5)
    assert (drawn[counts > 0] == counts.max()).all()
    if rows is not None:
        assert (np.diff(rows) >= 0).all()
        assert set(rows.tolist()) == set(range(len(labels)))


@pytest.mark.parametrize(("batch", "streams"), [(1, 1), (64, 64), (256, 64), (96, 48), (100, 50), (67, 1)])
def test_default_streams_is_the_largest_divisor_up_to_64(batch, streams):
    assert default_streams(batch) == streams


def test_permutation_is_one():
    assert np.array_equal(np.sort(permutation(0, "p", 1, 100)), np.arange(100))
