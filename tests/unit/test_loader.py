"""Images by sample number, as they lie in the shards, however they are read."""

import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gdd_dist.data import loader
from gdd_dist.data.loader import Images, prefetch, to_float, to_uint8
from sharding.errors import UserError
from sharding.manifest import Manifest
from sharding.shards import Shards, decode


@pytest.fixture(scope="module")
def manifest(digits):
    return Manifest.load(digits)


@pytest.fixture(scope="module")
def plain(digits, manifest):
    """All of val, image by image: uint8 [N, C, H, W]."""
    shards = Shards(digits, manifest, "val")
    out = np.empty((shards.samples, 16, 16, 1), np.uint8)
    for i in range(shards.samples):
        decode(shards.payload(i), out[i])
    return torch.from_numpy(out).permute(0, 3, 1, 2)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 239), max_size=40), st.sampled_from(["auto", "none", "ram"]), st.sampled_from([1, 2, 5]))
def test_any_way_of_reading_gives_the_same_images(digits, manifest, plain, indices, resident, threads):
    images = Images(digits, manifest, "val", threads=threads, resident=resident)
    indices = np.array(indices, np.int64)
    for _ in range(2):  # the second time from memory
        found = images.read(indices)
        assert found.dtype == torch.uint8
        assert torch.equal(found, plain[torch.from_numpy(indices)])
    assert len(images) == 240


def test_a_given_buffer_is_filled(digits, manifest, plain):
    images = Images(digits, manifest, "val", threads=2, resident="none")
    out = np.empty((3, 16, 16, 1), np.uint8)
    found = images.read(np.array([5, 1, 5]), out)
    assert found.data_ptr() == out.ctypes.data
    assert torch.equal(found, plain[[5, 1, 5]])


def test_several_threads_may_read_at_once(digits, manifest, plain):
    images, wrong = Images(digits, manifest, "val", threads=2, resident="ram"), []

    def read(seed):
        rng = np.random.default_rng(seed)
        for _ in range(20):
            indices = rng.integers(0, 240, 30)
            if not torch.equal(images.read(indices), plain[torch.from_numpy(indices)]):
                wrong.append(seed)

    workers = [threading.Thread(target=read, args=(s,)) for s in range(4)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert not wrong


def test_images_are_kept_only_within_the_budget(digits, manifest):
    size = 240 * 256
    assert Images(digits, manifest, "val", budget=size)._kept is not None
    assert Images(digits, manifest, "val", budget=size - 1)._kept is None
    assert Images(digits, manifest, "val", budget=0, resident="ram")._kept is not None
    assert Images(digits, manifest, "val", budget=size, resident="none")._kept is None


@pytest.mark.parametrize("threads", [1, 3])
def test_an_image_that_does_not_decode_is_named_with_its_file(digits, manifest, monkeypatch, threads):
    images = Images(digits, manifest, "val", threads=threads, resident="none")
    bad = 7
    shard, row = images.shards.locate(bad)
    payload = bytes(images.shards.payload(bad))
    monkeypatch.setattr(loader, "decode", lambda data, out: decode(data[:20] if bytes(data) == payload else data, out))
    with pytest.raises(UserError) as e:
        images.read(np.arange(20))
    assert str(digits / manifest.splits["val"].shards[shard].file) in str(e.value)
    assert f"row {row}" in str(e.value)
    assert images.read(np.arange(8, 20)).shape == (12, 1, 16, 16)


def test_bytes_and_floats_are_each_others_inverse():
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    floats = to_float(every, torch.device("cpu"))
    assert floats.min() == -1
    assert floats.max() == pytest.approx(1)
    assert torch.equal(to_uint8(floats), every)
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


@given(st.integers(0, 5), st.integers(0, 12), st.integers(1, 5))
def test_prefetch_gives_each_step_once_in_order(start, count, ahead):
    assert list(prefetch(lambda s: s * s, start, start + count, ahead)) == [s * s for s in range(start, start + count)]


def test_prefetch_reads_so_far_ahead_and_no_farther():
    read = []
    batches = prefetch(lambda s: read.append(s) or s, 0, 10, 2)
    assert next(batches) == 0
    time.sleep(0.1)
    assert read == [0, 1, 2]
    batches.close()


def test_a_fault_while_reading_ahead_comes_where_its_batch_would():
    def read(step):
        if step == 3:
            raise UserError("step 3; mend it")
        return step

    batches = prefetch(read, 0, 10, 2)
    assert [next(batches) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(UserError, match="step 3"):
        next(batches)
