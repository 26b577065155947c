"""Learning rates as functions of the step."""

from __future__ import annotations

import math


def warmup_cosine(step: int, steps: int, peak: float, warmup: float = 0.05) -> float:
    """Linear to ``peak`` over the first ``warmup`` of ``steps``, then cosine to 0."""
    rise = max(1, int(steps * warmup))
    if step < rise:
        return peak * (step + 1) / rise
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def cosine(step: int, steps: int, first: float, last: float) -> float:
    """Cosine from ``first`` to ``last``."""
    return last + (first - last) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, steps))))
