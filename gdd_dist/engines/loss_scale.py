"""The loss scale of fp16 where torch's GradScaler cannot reach the gradients: DeepSpeed keeps and reduces them itself."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from gdd_dist.engines.nonfinite import all_finite

FIRST, BACKOFF, GROWTH, INTERVAL = 2.0**16, 0.5, 2.0, 2000


class LossScale:
    """Scales losses, unscales each gradient as it arrives; halves when a step overflowed, doubles after many good ones.

    Its state has the layout of torch.amp.GradScaler's, so that DDP and DeepSpeed go on from each other's.
    """

    def __init__(self, enabled: bool) -> None:
        self.enabled, self.overflow = enabled, False
        self._scale, self._good = (FIRST, 0) if enabled else (1.0, 0)

    def scale(self, loss: Tensor) -> Tensor:
        """The loss to be sent back."""
        return loss * self._scale if self.enabled else loss

    def unscale(self, gradient: Tensor) -> Tensor:
        """A weight's gradient in float32, before it is reduced; what overflowed stays infinite."""
        return gradient / self._scale

    def drop_overflow(self, parameters: Iterable[nn.Parameter]) -> None:
        """Without an optimizer that looks for itself: clear the gradients when one of the reduced ones is not finite."""
        parameters = list(parameters)
        self.overflow = not bool(all_finite(parameters))
        if self.overflow:
            for p in parameters:
                p.grad = None

    @property
    def sought(self) -> bool:
        """Whether an overflow may be the scale's, which is above 1, and no fault of the numbers."""
        return self.enabled and self._scale > 1

    def update(self) -> None:
        """After a step."""
        if self.enabled and self.overflow:
            self._scale, self._good = self._scale * BACKOFF, 0
        elif self.enabled:
            self._good += 1
            if self._good == INTERVAL:
                self._scale, self._good = self._scale * GROWTH, 0
        self.overflow = False

    def state_dict(self) -> dict[str, Any]:
        """As torch.amp.GradScaler says it; empty where there is no scaling."""
        if not self.enabled:
            return {}
        return {
            "scale": self._scale,
            "growth_factor": GROWTH,
            "backoff_factor": BACKOFF,
            "growth_interval": INTERVAL,
            "_growth_tracker": self._good,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What ``state_dict`` or GradScaler gave."""
        if self.enabled and state:
            self._scale, self._good = float(state["scale"]), int(state["_growth_tracker"])
