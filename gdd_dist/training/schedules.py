"""Learning rates as functions of the step."""

from __future__ import annotations

import math


def warmup_cosine(step: int, steps: int, peak: float, warmup: float = 0.05) -> float:
    """Return a linear increase to ``peak`` over the share ``warmup`` of ``steps``, then a cosine decay to 0."""
    rise = max(1, int(steps * warmup))
    if step < rise:
        return peak * (step + 1) / rise
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def cosine(step: int, steps: int, first: float, last: float) -> float:
    """Return a cosine decay from ``first`` to ``last``."""
    return last + (first - last) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, steps))))
