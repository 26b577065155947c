"""Random numbers as a pure function of (seed, purpose, step, slot); a slot is a position in the global batch.

The generator is the counter-based Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). The
numbers of a slot depend only on that slot, so a rank draws only its own slots, and any number of ranks draws the same batch.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

_MASK = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


def philox(counter: np.ndarray, key: tuple[int, int] | tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Philox-4x32-10: ``counter`` uint32 [..., 4] and a key of two 32-bit words, or uint64 [...] of such words → uint32 [..., 4]."""
    c0, c1, c2, c3 = (counter[..., i].astype(np.uint64) for i in range(4))
    k0, k1 = (np.asarray(word, np.uint64) for word in key)
    for _ in range(10):
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c2 = (p1 >> _SHIFT) ^ c1 ^ k0, (p0 >> _SHIFT) ^ c3 ^ k1
        c1, c3 = p1 & _MASK, p0 & _MASK
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & _MASK, (k1 + np.uint64(0xBB67AE85)) & _MASK
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


@lru_cache(maxsize=1024)
def _key(seed: int, purpose: str) -> tuple[int, int]:
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def _bits(seed: int, purpose: str, step: int, slots: np.ndarray, n: int) -> np.ndarray:
    """Return random bits, uint32 [len(slots), n]."""
    blocks = -(-n // 4)
    found = philox(_counter(step, slots, blocks), _key(seed, purpose))
    return found.reshape(len(slots), blocks * 4)[:, :n]


def _counter(step: int, slots: np.ndarray, blocks: int) -> np.ndarray:
    """Return counters, uint32 [len(slots), blocks, 4]: (block, slot, step low, step high + slot high)."""
    slots = np.asarray(slots, dtype=np.uint64)
    counter = np.empty((len(slots), blocks, 4), dtype=np.uint32)
    counter[..., 0] = np.arange(blocks, dtype=np.uint32)
    counter[..., 1] = (slots & _MASK).astype(np.uint32)[:, None]
    counter[..., 2] = step & 0xFFFFFFFF
    counter[..., 3] = ((slots >> _SHIFT) ^ np.uint64((step >> 32) << 16)).astype(np.uint32)[:, None]
    return counter


def uniform(seed: int, purpose: str, step: int, slots: np.ndarray, n: int) -> np.ndarray:
    """Return uniform float32 [len(slots), n] in [0, 1), multiples of 2^-24; row i depends only on ``slots[i]``."""
    return (_bits(seed, purpose, step, slots, n) >> np.uint32(8)).astype(np.float32) * np.float32(2**-24)


def normal(seed: int, purpose: str, step: int, slots: np.ndarray, n: int) -> np.ndarray:
    """Return standard normal float32 [len(slots), n] by Box-Muller in float64; row i depends only on ``slots[i]``."""
    half = -(-n // 2)
    bits = _bits(seed, purpose, step, slots, 2 * half).astype(np.float64)
    radius = np.sqrt(-2 * np.log((bits[:, :half] + 1) * 2.0**-32))  # + 1 avoids log(0)
    angle = 2 * np.pi * 2.0**-32 * bits[:, half:]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)[:, :n].astype(np.float32)


def permutation(seed: int, purpose: str, step: int, n: int) -> np.ndarray:
    """Return a permutation of range(n), int64 [n]."""
    return permutations(seed, [purpose], step, n)[0]


def permutations(seed: int, purposes: Sequence[str], step: int, n: int) -> np.ndarray:
    """Return `permutation` of each purpose, int64 [len(purposes), n]; faster, because their keys are drawn together."""
    keys = np.array([_key(seed, purpose) for purpose in purposes], np.uint64)
    words = philox(_counter(step, np.zeros(1), 1)[0], (keys[:, 0], keys[:, 1])).astype("<u4")
    draws = (np.random.Generator(np.random.Philox(key=four.view("<u8"))) for four in words)
    return np.stack([draw.permutation(n) for draw in draws])
