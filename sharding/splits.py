"""Which samples go to which split and which shard: pure functions of labels and seed."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sharding.errors import UserError
from sharding.tars import shown

_PURPOSES = ("test", "val", "deal-train", "deal-val", "deal-test")


def apportion(counts: NDArray[np.int64], total: int) -> NDArray[np.int64]:
    """Return how many of `total` each class gets, int64 [C], in proportion to `counts` by largest remainders.

    Each class gives at least one and keeps at least one, so that the sum may differ from `total` if classes are
    small. Needs counts ≥ 2.
    """
    quotas = counts * (total / counts.sum())
    shares = np.clip(np.floor(quotas).astype(np.int64), 1, counts - 1)
    for label in np.argsort(shares - quotas, kind="stable"):
        if shares.sum() >= total:
            break
        shares[label] += shares[label] < counts[label] - 1
    return shares


def stratified(
    labels: ArrayLike, total: int, *, seed: int, purpose: str, classes: Sequence[str] = ()
) -> NDArray[np.bool_]:
    """Choose about `total` of N samples at random, every class in proportion. Returns a mask, bool [N].

    Raises UserError when a class, one of the names `classes`, has fewer than two samples.
    """
    labels = np.asarray(labels, np.int64)
    counts = np.bincount(labels)
    if small := np.flatnonzero((counts < 2) & (counts > 0)).tolist():
        what = f"class {shown(classes[small[0]])} has too few images for both {purpose} and train"
        raise UserError(f"{what}; add images or remove the class")
    chosen = np.zeros(len(labels), bool)
    present = np.flatnonzero(counts)
    for label, share in zip(present, apportion(counts[present], total), strict=True):
        chosen[_shuffled(np.flatnonzero(labels == label), seed, purpose, int(label))[:share]] = True
    return chosen


def deal(labels: ArrayLike, shards: int, *, seed: int, split: str) -> list[NDArray[np.int64]]:
    """Shuffle N samples and distribute them over shards. Returns the sample numbers of each shard in their order.

    Any two shards differ by at most one sample, in total and in each class.
    """
    labels = np.asarray(labels, np.int64)
    purpose, found = f"deal-{split}", np.unique(labels).tolist()
    order = np.concatenate([_shuffled(np.flatnonzero(labels == c), seed, purpose, c) for c in found])
    # Class number -1 stands for the shuffle inside each shard, which mixes the classes.
    return [_shuffled(order[shard::shards], seed, purpose, -1 - shard) for shard in range(shards)]


def _shuffled(values: NDArray[np.int64], seed: int, purpose: str, stream: int) -> NDArray[np.int64]:
    # Seeds must not be negative, so the last word distinguishes class c from the shuffle inside shard s.
    words = [seed, _PURPOSES.index(purpose), abs(stream), int(stream < 0)]
    return np.random.default_rng(words).permutation(values)
