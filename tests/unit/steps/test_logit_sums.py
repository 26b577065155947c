"""Class means of the cache: each rank sums the files it wrote, and neither their order nor the number of ranks changes a bit."""

from types import SimpleNamespace

import numpy as np
import pytest

from gdd_dist.steps.logits import Sums

SHARDS, VIEWS, CLASSES = (700, 1, 299, 500), 2, 5


class Ranks:
    """Adds up what its ranks give, as a reduce would."""

    def __init__(self):
        self.waiting = []

    def total(self, values):
        self.waiting.append(values.clone())
        return values


def data():
    draw = np.random.default_rng(0)
    labels = draw.integers(0, CLASSES - 1, sum(SHARDS))  # the last class has no image
    spread = np.exp(draw.normal(0, 4, (2, VIEWS, sum(SHARDS), CLASSES)))
    return labels, (spread * draw.choice([-1, 1], spread.shape)).clip(-65504, 65504).astype(np.float16)


def summed(labels, logits, jobs):
    """What one rank holds after these jobs (teacher, shard)."""
    train = SimpleNamespace(labels=labels, shards=SimpleNamespace(shard_samples=SHARDS))
    config = SimpleNamespace(logits=SimpleNamespace(views=VIEWS))
    sums = Sums(SimpleNamespace(config=config, classes=CLASSES, images=lambda _: train, world=Ranks()), 2)
    starts = np.cumsum([0, *SHARDS])
    for teacher, shard in jobs:
        sums.add(teacher, shard, logits[teacher][:, starts[shard] : starts[shard + 1]])
    return sums


@pytest.mark.parametrize("seed", range(5))
def test_order_and_ranks_change_no_bit_of_the_class_means(seed):
    labels, logits = data()
    jobs = [(t, s) for t in range(2) for s in range(len(SHARDS))]
    expected = summed(labels, logits, jobs).means()
    counts = np.maximum(np.bincount(labels, minlength=CLASSES), 1)
    for t in range(2):
        for c in range(CLASSES):
            exact = logits[t][:, labels == c].astype(np.float64).sum(1) / counts[c]
            assert np.array_equal(expected[t, :, c], exact.astype(np.float32))
    draw = np.random.default_rng(seed)
    dealt = [jobs[i] for i in draw.permutation(len(jobs))]
    parts = [summed(labels, logits, dealt[r::3]) for r in range(3)]
    for part in parts:
        part.means()
    for t in range(2):
        total = sum(part._ctx.world.waiting[t] for part in parts)
        assert np.array_equal((total.numpy() / counts[:, None]).astype(np.float32), expected[t])
