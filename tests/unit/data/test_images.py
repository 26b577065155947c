"""Images by sample number, as they lie in the shards, however they are read."""

import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tars import image, jpeg_bomb, tar

from gdd_dist.data.images import Images, prefetch, to_float, to_uint8
from gdd_dist.data.workers import FEW, Workers
from sharding.errors import UserError
from sharding.manifest import Manifest
from sharding.options import Options
from sharding.shards import Shards, decode
from sharding.writer import build


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


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 239), max_size=80),
    st.sampled_from(["auto", "none", "ram", "device"]),
    st.sampled_from([1, 2, 5]),
)
def test_any_way_of_reading_gives_the_same_images(digits, manifest, plain, cache, indices, resident, threads):
    for kept in (cache, None):
        images = Images(digits, manifest, "val", threads=threads, resident=resident, cache=kept)
        for _ in range(2):
            found = images.read(np.array(indices, np.int64))
            assert found.dtype == torch.uint8
            assert torch.equal(found, plain[torch.tensor(indices, dtype=torch.int64)])
        assert len(images) == 240


def test_batches_reuse_memory_that_nobody_holds_and_no_other(digits, manifest, plain):
    images = Images(digits, manifest, "val", resident="none")
    first = images.read(np.arange(20))
    where = first.data_ptr()
    part = first[3:5]
    del first
    other = images.read(np.arange(20, 40))
    assert other.data_ptr() != where
    assert torch.equal(part, plain[3:5])
    del part
    again = images.read(np.arange(40, 60))
    assert again.data_ptr() == where
    assert torch.equal(again, plain[40:60])
    assert torch.equal(other, plain[20:40])


def test_several_threads_may_read_at_once(digits, manifest, plain, tmp_path):
    for resident in ("ram", "none"):
        images, wrong = Images(digits, manifest, "val", threads=2, resident=resident, cache=tmp_path), []

        def read(seed, images=images, wrong=wrong):
            rng = np.random.default_rng(seed)
            for _ in range(20):
                indices = rng.integers(0, 240, 70)
                if not torch.equal(images.read(indices), plain[torch.from_numpy(indices)]):
                    wrong.append(seed)

        workers = [threading.Thread(target=read, args=(s,)) for s in range(4)]
        for w in workers:
            w.start()
        for w in workers:
            w.join()
        assert not wrong


@pytest.mark.parametrize("bad", [-1, 240, 10**9])
def test_a_sample_that_is_not_there_is_an_error(digits, manifest, tmp_path, bad):
    for resident in ("ram", "none"):
        images = Images(digits, manifest, "val", resident=resident, cache=tmp_path)
        with pytest.raises(IndexError):
            images.read(np.array([0, bad]))


@pytest.mark.parametrize("threads", [1, 3])
def test_an_image_that_does_not_decode_is_named_with_its_file(digits, manifest, monkeypatch, threads):
    images = Images(digits, manifest, "val", threads=threads, resident="none")
    bad = 7
    shard, row = images.shards.locate(bad)
    payload = bytes(images.shards.payload(bad))
    monkeypatch.setattr(
        "gdd_dist.data.images.decode", lambda data, out: decode(data[:20] if bytes(data) == payload else data, out)
    )
    with pytest.raises(UserError) as e:
        images.read(np.arange(70))
    assert str(digits / manifest.splits["val"].shards[shard].file) in str(e.value)
    assert f"row {row}" in str(e.value)
    assert images.read(np.arange(8, 20)).shape == (12, 1, 16, 16)


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [0, FEW, FEW + 1, 500])
def test_workers_take_each_task_once(threads, count):
    done = []
    Workers(threads).share(lambda tasks: done.extend(tasks), list(range(count)))
    assert sorted(done) == list(range(count))


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_one_who_asks_alone_gets_all_threads(threads):
    meeting, done = threading.Barrier(threads), []

    def work(tasks):
        meeting.wait(240)  # fewer would wait in vain, and one more too
        done.extend(tasks)

    Workers(threads).share(work, list(range(200)))
    assert sorted(done) == list(range(200))


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_two_who_ask_share_the_threads(threads):
    workers, lock, live, most = Workers(threads), threading.Lock(), set(), []

    def work(tasks):
        with lock:
            live.add(threading.get_ident())
            most.append(len(live))
        for _ in tasks:
            time.sleep(0.0005)
        with lock:
            live.remove(threading.get_ident())

    both = [
        threading.Thread(target=lambda: [workers.share(work, list(range(100))) for _ in range(5)]) for _ in range(2)
    ]
    for reader in both:
        reader.start()
    for reader in both:
        reader.join()
    # The second to come may find the first with all threads, and waits for none of them.
    assert max(most) <= (1 if threads == 1 else threads + 1)
    assert workers._working == workers._callers == 0


@pytest.mark.parametrize("where", ["MainThread", "decode"])
def test_a_fault_on_one_thread_comes_when_none_works_any_more(where):
    taken, done, wait = [], [], threading.Event()

    def work(tasks):
        for task in tasks:
            taken.append(task)
            wait.wait(0.001)
            if threading.current_thread().name.startswith(where):
                raise UserError(f"{where}; mend it")
            done.append(task)

    with pytest.raises(UserError, match=where):
        Workers(4).share(work, list(range(200)))
    assert len(taken) > len(done)
    before = list(taken)
    time.sleep(0.05)
    assert taken == before


@pytest.mark.parametrize("size", [4, 12, 65500])
def test_a_jpeg_of_another_size_is_refused_and_not_decoded(tmp_path, size):
    files = {f"{i}.{ext}": data for i in range(40) for ext, data in (("jpg", image(i)), ("cls", b"%d" % (i % 2)))}
    path = tar(tmp_path / "in.tar", files)
    build(f"webdataset:{path}", tmp_path / "data", Options(test_fraction=0.2, val_fraction=0.2, workers=1))
    manifest = Manifest.load(tmp_path / "data")
    images = Images(tmp_path / "data", manifest, "train", resident="none")
    assert images.read(np.arange(5)).shape == (5, 3, 8, 8)
    wrong = jpeg_bomb() if size > 100 else image(0, size=size)
    images.shards.payloads = lambda indices: iter([memoryview(wrong)] * len(indices))
    with pytest.raises(UserError, match=r"train/000000\.tar, row 3: "):
        images.read(np.array([3, 4]))


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
    assert sorted(read) == [0, 1, 2]
    batches.close()


@pytest.mark.parametrize(("size", "ahead"), [(1, 4), (50, 2), (100, 1), (1000, 1)])
def test_prefetch_keeps_within_its_bytes_but_for_one_batch(size, ahead):
    read = []
    batches = prefetch(lambda s: read.append(s) or (s, np.empty(size, np.uint8)), 0, 10, 4, limit=100)
    assert next(batches)[0] == 0
    time.sleep(0.1)
    assert sorted(read) == list(range(1 + ahead))
    assert [step for step, _ in batches] == list(range(1, 10))


def test_a_fault_while_reading_ahead_comes_where_its_batch_would():
    def read(step):
        if step == 3:
            raise UserError("step 3; mend it")
        return step

    batches = prefetch(read, 0, 10, 2)
    assert [next(batches) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(UserError, match="step 3"):
        next(batches)


def test_threads_that_read_ahead_are_on_the_gpu_of_who_asks(monkeypatch):
    here = threading.local()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: getattr(here, "device", 0))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: setattr(here, "device", device))
    torch.cuda.set_device(3)
    assert list(prefetch(lambda _step: torch.cuda.current_device(), 0, 8, 2)) == [3] * 8
