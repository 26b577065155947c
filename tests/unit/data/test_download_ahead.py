"""Which shards of a remote data set come ahead: in the order of use, and no more than there is room for."""

import threading

import numpy as np
import pytest

from gdd_dist.data.order import Order
from gdd_dist.data.remote import Ahead
from sharding.manifest import ShardInfo

SAMPLES = 10


def shards(count, size=100):
    return [ShardInfo(f"train/{i:06d}.tar", SAMPLES, size, "", "") for i in range(count)]


class Asked:
    """Keeps the order in which shards are asked for."""

    def __init__(self):
        self.order, self._news = [], threading.Condition()

    def __call__(self, info):
        with self._news:
            self.order.append(int(info.file[6:12]))
            self._news.notify_all()

    def has(self, count):
        with self._news:
            return self._news.wait_for(lambda: len(self.order) >= count, timeout=240)


def first_uses(order, steps, rank=0, world=1):
    """Shards by the first batch that needs them."""
    found = [i // SAMPLES for step in range(steps) for i in order.batch(step, rank, world).tolist()]
    return list(dict.fromkeys(found))


@pytest.mark.parametrize(("rank", "world"), [(0, 1), (1, 2)])
def test_shards_come_in_the_order_in_which_training_needs_them(rank, world):
    order, asked = Order((SAMPLES,) * 12, 4, 2, seed=3, window=15), Asked()
    Ahead(asked, 1200, shards(12), lambda s: order.batch(s, rank, world), range(30))
    expected = first_uses(order, 30, rank, world)
    assert asked.has(len(expected))
    assert asked.order == expected


def test_beyond_the_room_a_shard_comes_when_the_reader_has_left_an_earlier_one():
    asked = Asked()
    ahead = Ahead(asked, 300, shards(6), lambda step: np.array([SAMPLES * step]), range(6))
    for read in range(6):
        assert asked.has(min(3 + read, 6))
        assert asked.order == list(range(min(3 + read, 6)))  # what is more waits for `advance`
        ahead.advance()


def test_a_shard_that_is_needed_again_and_again_stays_and_is_asked_for_once():
    asked = Asked()
    ahead = Ahead(asked, 300, shards(6), lambda step: np.array([0, SAMPLES * (1 + step % 5)]), range(5))
    for _ in range(5):
        ahead.advance()
    assert asked.has(6)
    assert asked.order == list(range(6))


def test_room_for_less_than_a_shard_is_room_for_one():
    asked = Asked()
    ahead = Ahead(asked, 1, shards(3), lambda step: np.array([SAMPLES * step]), range(3))
    assert asked.has(1)
    assert asked.order == [0]
    ahead.advance()
    assert asked.has(2)
    ahead.close()
    ahead.advance()


def test_nothing_comes_for_batches_that_will_not_be_read():
    asked = Asked()
    ahead = Ahead(asked, 100, shards(3), lambda step: np.array([SAMPLES * step]), range(3))
    assert asked.has(1)
    ahead.close()
    ahead.advance()
    assert asked.order == [0]
