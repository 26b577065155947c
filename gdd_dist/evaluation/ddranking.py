"""DD-Ranking's scores (NUS-HPC-AI-Lab/DD-Ranking): how much of an accuracy comes from the images, not from labels or augmentation.

Accuracies as fractions. LRS, label-robust score: HLR = full - synthetic, both with hard labels; IOR = synthetic - random real
images of the same number, both with the row's labels and training; alpha = w IOR - (1 - w) HLR, w = 1/2. ARS,
augmentation-robust score: beta = g (synthetic - random real, both augmented) + (1 - g) (the same, both plain), g = 1/2. Both
are mapped from [-1, 1] to [0, 1] by (e^x - e^-1) / (e - e^-1).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

WEIGHT = GAMMA = 0.5


def score(x: float) -> float:
    """Map [-1, 1] to [0, 1]."""
    return (math.exp(x) - math.exp(-1)) / (math.e - math.exp(-1))


def lrs(full_hard: float, synthetic_hard: float, synthetic: float, random_real: float, weight: float = WEIGHT) -> float:
    """Return the label-robust score of accuracies in percent."""
    hlr, ior = (full_hard - synthetic_hard) / 100, (synthetic - random_real) / 100
    return score(weight * ior - (1 - weight) * hlr)


def ars(
    synthetic: float, random_real: float, synthetic_plain: float, random_real_plain: float, gamma: float = GAMMA
) -> float:
    """Return the augmentation-robust score of accuracies in percent; ``plain``: trained without augmentation."""
    augmented, plain = (synthetic - random_real) / 100, (synthetic_plain - random_real_plain) / 100
    return score(gamma * augmented + (1 - gamma) * plain)


def with_scores(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Fill in ``lrs`` and ``ars`` of the generators' rows if everything needed was measured; drop rows without augmentation."""

    def key(r: Mapping[str, Any], **changed: Any) -> tuple[Any, ...]:
        names = ("train_on", "student", "protocol", "labels", "ipc")
        return (
            *({**r, **changed}[name] for name in names),
            changed.get("augmented", r.get("augmented", True)),
            r.get("select", 1),
            r.get("condense", 0),
        )

    means = {key(r): r["mean"] for r in results}

    def scored(r: Mapping[str, Any]) -> dict[str, Any]:
        full = means.get(key(r, train_on="full", protocol=None, labels="hard", ipc=None))
        hard, real = means.get(key(r, labels="hard")), means.get(key(r, train_on="real"))
        plain, real_plain = means.get(key(r, augmented=False)), means.get(key(r, train_on="real", augmented=False))
        found = dict(r)
        if r["train_on"] in ("gan", "matched") and real is not None:
            if full is not None and hard is not None:
                found["lrs"] = lrs(full, hard, r["mean"], real)
            if plain is not None and real_plain is not None:
                found["ars"] = ars(r["mean"], real, plain, real_plain)
        return found

    return [scored(r) for r in results if r.get("augmented", True)]
