"""Global batches are the same images and labels whoever reads them, from wherever, before and after a resume (design 5.1)."""

import hashlib
import io
import os
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
import ranks
import stores
from PIL import Image

from gdd_dist.data.images import Images
from gdd_dist.data.order import Order
from gdd_dist.data.remote import Cache, open_data
from gdd_dist.data.workers import prefetch
from sharding.manifest import Manifest
from sharding.options import Options
from sharding.writer import build

BATCH, STEPS = 48, 60
"""Steps of 24 an epoch: the sequence crosses two ends of an epoch."""


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Where the same data set lies: on this disk and in a store, and what a client of the store needs."""
    data = tmp_path_factory.mktemp("data") / "digits"
    build("digits", data, Options(shard_size=400_000, workers=1))
    store = stores.Store()
    yield {"local": str(data), "remote": store.upload(data, "identity")}, store.environment
    store.close()


def read(rank, world, data, environment, cache, resident, start):
    """Digests of this rank's images and labels, sample by sample in the order of the batch: for each step from ``start`` on."""
    os.environ.update(environment)
    where = open_data(data, Cache.of(str(cache / "shards"), "1GB", 60.0))
    manifest = Manifest.load(where)
    images = Images(where, manifest, "train", threads=1 + rank % 2, resident=resident, cache=cache / "decoded")
    order = Order(images.shards.shard_samples, BATCH, 16, seed=3, window=100)

    def batch(step):
        indices = order.batch(step, rank, world)
        return images.read(indices), images.labels[indices]

    found = []
    for pixels, labels in prefetch(batch, start, STEPS, 1 + rank % 3):
        pairs = zip(pixels.numpy(), labels.tolist(), strict=True)
        found.append([hashlib.sha256(x.tobytes() + bytes([y])).hexdigest()[:16] for x, y in pairs])
    return found


def joined(parts):
    """The global batches, from those of all ranks in rank order."""
    return [[digest for rank in step for digest in rank] for step in zip(*parts, strict=True)]


@pytest.fixture(scope="module")
def expected(places, tmp_path_factory):
    """One rank, streaming from this disk, from the first step on."""
    found, environment = places
    cache = tmp_path_factory.mktemp("one")
    return joined(ranks.call(cache / "job", 1, read, 1, found["local"], environment, cache, "none", 0))


def test_the_batches_are_those_of_an_independent_reader(places, expected):
    found, _ = places
    known = set()
    for info in Manifest.load(found["local"]).splits["train"].shards:
        with tarfile.open(f"{found['local']}/{info.file}") as archive:
            contents = {m.name: archive.extractfile(m).read() for m in archive}
        for name in (n for n in contents if not n.endswith(".cls")):
            pixels, label = (
                np.asarray(Image.open(io.BytesIO(contents[name]))),
                int(contents[name.split(".")[0] + ".cls"]),
            )
            known.add(hashlib.sha256(pixels.tobytes() + bytes([label])).hexdigest()[:16])
    assert {digest for step in expected for digest in step} == known
    assert all(len(step) == BATCH for step in expected)
    assert len({tuple(step) for step in expected}) == STEPS


@pytest.mark.parametrize(
    ("world", "where", "resident"),
    [(2, "local", "none"), (4, "local", "ram"), (8, "local", "none"), (2, "remote", "ram"), (8, "remote", "none")],
)
def test_any_ranks_any_place_and_any_resume_give_the_same_global_batches(
    places, expected, tmp_path, world, where, resident
):
    found, environment = places
    argument = (world, found[where], environment, tmp_path, resident)
    assert joined(ranks.call(tmp_path / "job", world, read, *argument, 0)) == expected
    step = random.Random(f"{world}{where}{resident}").randrange(1, STEPS)
    assert joined(ranks.call(tmp_path / "again", world, read, *argument, step)) == expected[step:]


def test_another_seed_would_have_been_seen(places, expected):
    """Negative control: the digests do tell orders apart."""
    found, _ = places
    manifest = Manifest.load(found["local"])
    images = Images(Path(found["local"]), manifest, "train", resident="none")
    order = Order(images.shards.shard_samples, BATCH, 16, seed=4, window=100)
    pixels = images.read(order.batch(0)).numpy()
    labels = images.labels[order.batch(0)].tolist()
    other = [hashlib.sha256(x.tobytes() + bytes([y])).hexdigest()[:16] for x, y in zip(pixels, labels, strict=True)]
    assert other != expected[0]
