"""The loss scale of fp16 for DeepSpeed, whose gradients torch's GradScaler cannot reach."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from gdd_dist.engines.nonfinite import all_finite

FIRST, BACKOFF, GROWTH, INTERVAL = 2.0**16, 0.5, 2.0, 2000


class LossScale:
    """Scales losses and unscales each gradient; halves after an overflow, doubles after many finite steps.

    Its state has the layout of torch.amp.GradScaler, so that DDP and DeepSpeed can load each other's checkpoints.
    """

    def __init__(self, enabled: bool) -> None:
        self.enabled, self.overflow = enabled, False
        self._scale, self._good = (FIRST, 0) if enabled else (1.0, 0)

    def scale(self, loss: Tensor) -> Tensor:
        """Return the scaled loss for the backward pass."""
        return loss * self._scale if self.enabled else loss

    def unscale(self, gradient: Tensor) -> Tensor:
        """Return a weight's gradient in float32 before reduction; overflows stay infinite."""
        return gradient / self._scale

    def drop_overflow(self, parameters: Iterable[nn.Parameter]) -> None:
        """Clear the gradients if a reduced one is not finite, for an optimizer that does not check this itself."""
        parameters = list(parameters)
        self.overflow = not bool(all_finite(parameters))
        if self.overflow:
            for p in parameters:
                p.grad = None

    @property
    def sought(self) -> bool:
        """Whether an overflow may come from the scale, which is above 1, and not from the training itself."""
        return self.enabled and self._scale > 1

    def update(self) -> None:
        """Update the scale after a step."""
        if self.enabled and self.overflow:
            self._scale, self._good = self._scale * BACKOFF, 0
        elif self.enabled:
            self._good += 1
            if self._good == INTERVAL:
                self._scale, self._good = self._scale * GROWTH, 0
        self.overflow = False

    def state_dict(self) -> dict[str, Any]:
        """Return the state in torch.amp.GradScaler's layout; empty without scaling."""
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
        """Load the state of ``state_dict`` or GradScaler."""
        if self.enabled and state:
            self._scale, self._good = float(state["scale"]), int(state["_growth_tracker"])
