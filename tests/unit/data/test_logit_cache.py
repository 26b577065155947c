"""The cache of logits, joined to samples by (shard, row)."""

import gc
import io
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gdd_dist.data.logit_cache import MEANS, LogitCache, file_bytes, logit_file
from gdd_dist.steps.logits import view_draws
from sharding.errors import UserError

CLASSES = 3


def write(directory, shards, teachers=2, views=2):
    """A cache whose number at (teacher, view, sample, class) tells these four."""
    rows = np.concatenate([[0], np.cumsum(shards)])
    for t in range(teachers):
        for s, n in enumerate(shards):
            v, i, c = np.meshgrid(np.arange(views), rows[s] + np.arange(n), np.arange(CLASSES), indexing="ij")
            path = logit_file(directory, t, s)
            path.parent.mkdir(exist_ok=True)
            np.save(path, (t * 1000 + v * 300 + i * 3 + c).astype(np.float16))
    np.save(directory / MEANS, np.zeros((teachers, views, CLASSES, CLASSES), np.float32))
    return directory


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_take_gives_the_row_of_that_sample_of_that_view_of_that_teacher(tmp_path_factory, data):
    shards = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=6))
    cache = LogitCache(write(tmp_path_factory.mktemp("cache"), shards), shards)
    count = data.draw(st.integers(0, 12))
    samples = np.array(data.draw(st.lists(st.integers(0, sum(shards) - 1), min_size=count, max_size=count)), np.int64)
    views = np.array(data.draw(st.lists(st.integers(0, 1), min_size=count, max_size=count)), np.int64)
    teacher = data.draw(st.integers(0, 1))
    found = cache.take(teacher, samples, views)
    expected = teacher * 1000 + views[:, None] * 300 + samples[:, None] * 3 + np.arange(CLASSES)
    assert found.dtype == np.float32
    assert found.shape == (count, CLASSES)
    assert np.array_equal(found, expected.astype(np.float32))


def test_class_means_and_views(tmp_path):
    cache = LogitCache(write(tmp_path, [4], views=3), [4])
    assert cache.views == 3
    assert cache.class_means.shape == (2, 3, CLASSES, CLASSES)


def test_more_files_than_a_process_may_hold_open(tmp_path):
    shards = [1] * 300
    cache = LogitCache(write(tmp_path, shards), shards)
    for t in (0, 1, 0):
        samples = np.arange(300)
        assert cache.take(t, samples, np.zeros(300, np.int64))[:, 0].tolist() == (t * 1000 + samples * 3).tolist()
    assert cache._file.cache_info().currsize <= 256


@pytest.fixture
def busy_collector():
    """Garbage is collected all the time, with a callback, so that threads take turns even inside the parser."""
    found, interval = gc.get_threshold(), sys.getswitchinterval()

    def callback(phase, info):
        sum(range(20))

    gc.callbacks.append(callback)
    gc.set_threshold(1)
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)
    gc.set_threshold(*found)
    gc.callbacks.remove(callback)


def test_threads_that_read_ahead_may_open_files_at_once(tmp_path, busy_collector):
    """CPython 3.11 fails where two threads parse source at a time, as `np.load` does with a header."""
    shards = [1] * 40
    cache, every = LogitCache(write(tmp_path, shards), shards), np.arange(40)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda t: cache.take(t % 2, every, np.zeros(40, np.int64))[:, 0].tolist(), range(4)))
    assert found == [((t % 2) * 1000 + every * 3).tolist() for t in range(4)]


def damaged(kind, good):
    stream = io.BytesIO()
    if kind == "other rows":
        np.save(stream, np.zeros((2, 5, CLASSES), np.float16))
    elif kind == "other dtype":
        np.save(stream, np.zeros((2, 4, CLASSES), np.float32))
    elif kind == "pickled":
        np.save(stream, np.array([{}, {}], dtype=object), allow_pickle=True)
    return {"truncated": good[:-5], "cut in its header": good[:20], "empty": b""}.get(kind, stream.getvalue())


@pytest.mark.parametrize(
    "kind", ["truncated", "cut in its header", "empty", "other rows", "other dtype", "pickled", "missing"]
)
def test_a_file_that_is_not_what_was_written_is_named(tmp_path, kind):
    path = logit_file(write(tmp_path, [4]), 1, 0)
    good = path.read_bytes()
    path.unlink()
    if kind != "missing":
        path.write_bytes(damaged(kind, good))
    cache = LogitCache(tmp_path, [4])
    with pytest.raises(UserError, match=f"{path}.*remove {tmp_path} and run gdd_dist.train again"):
        cache.take(1, np.array([0]), np.array([0]))
    cache.take(0, np.array([0]), np.array([0]))


def test_file_bytes_is_what_is_written(tmp_path):
    shards = [5, 9, 2]
    write(tmp_path, shards, teachers=3, views=2)
    there = [logit_file(tmp_path, 2, shard).stat().st_size for shard in range(3)]
    assert there == [file_bytes(samples, 2, CLASSES) for samples in shards]


def test_a_view_of_a_sample_is_a_function_of_seed_view_and_sample():
    some, all_ = view_draws(0, 1, np.array([7, 3])), view_draws(0, 1, np.arange(9))
    assert np.array_equal(some, all_[[7, 3]])
    assert not np.array_equal(view_draws(0, 2, np.arange(9)), all_)
    assert not np.array_equal(view_draws(1, 1, np.arange(9)), all_)
