"""Counts steps skipped because a loss or gradient was not finite; after many in a row the loop goes back once, then ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from sharding.errors import UserError

LIMIT = 10
"""After so many skipped steps in a row, training has diverged."""
_ANOTHER = 2**32
Result = TypeVar("Result")


class Diverged(Exception):
    """LIMIT steps in a row were skipped. ``draw``: selects the noise that they used."""

    def __init__(self, draw: int) -> None:
        super().__init__(f"{LIMIT} steps in a row had a loss or gradient that is not finite")
        self.draw = draw


class Skips:
    """Skipped steps of one loop. ``draw``: selects its noise, which changes after it went back.

    The device knows whether a step moved long after the host has queued it. So the host reads this when the next step is noted, or
    earlier if the counts are requested, so that saved and reported counts are never late.
    """

    def __init__(self) -> None:
        self.draw = 0
        self._total, self._in_a_row, self._news = 0, 0, False
        self._unread: Callable[[], bool] | None = None

    def note(self, moved: Tensor) -> None:
        """Record whether a step moved the weights, a bool scalar. Raises Diverged at the LIMIT-th skipped step in a row."""
        self.settle()
        self._unread = on_its_way(moved)
        if moved.device.type == "cpu":
            self.settle()

    def settle(self) -> None:
        """Count the last step, too; waits for the device. Raises Diverged like ``note``."""
        if self._unread is None:
            return
        moved, self._unread = self._unread(), None
        self._in_a_row = 0 if moved else self._in_a_row + 1
        self._total += not moved
        self._news = self._in_a_row == 1
        if self._in_a_row >= LIMIT:
            raise Diverged(self.draw)

    @property
    def total(self) -> int:
        """Number of steps skipped so far."""
        self.settle()
        return self._total

    @property
    def in_a_row(self) -> int:
        """Number of steps skipped since the last step that moved."""
        self.settle()
        return self._in_a_row

    def seed(self, seed: int) -> int:
        """Return the seed of this loop's noise; it is ``seed`` unless the loop went back."""
        return seed + self.draw * _ANOTHER

    def line(self, step: str, done: int) -> str:
        """Return the message about a skipped step, "" for steps after it; ``done``: number of noted steps. Does not wait."""
        if not self._news:
            return ""
        self._news, number = False, done - 1 - (self._unread is not None)
        return f"{step}: step {number} skipped on all ranks, its loss or gradient is not finite ({self._total} in all)"

    def state_dict(self) -> dict[str, int]:
        """Return the counts for a checkpoint."""
        return {"total": self.total, "in_a_row": self.in_a_row, "draw": self.draw}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the result of ``state_dict``."""
        self._total, self._in_a_row, self.draw = state["total"], state["in_a_row"], state["draw"]


def on_its_way(moved: Tensor) -> Callable[[], bool]:
    """Start to copy a bool scalar to the host; calling the returned function waits for it and returns it."""
    if moved.device.type == "cpu":
        return lambda: bool(moved)
    here = torch.empty((), dtype=torch.bool, pin_memory=True)
    here.copy_(moved, non_blocking=True)
    sent = torch.cuda.Event()
    sent.record()

    def read() -> bool:
        sent.synchronize()
        return bool(here)

    return read


def going_back_once(
    step: str, attempt: Callable[[int], Result], remedy: str, say: Callable[[str], None], draw: int = 0
) -> Result:
    """Return ``attempt(0)``; if it diverges, ``attempt(1)``, which continues from the last checkpoint with different noise.

    Raises UserError with the ``remedy`` if that diverges, too.
    """
    try:
        return attempt(draw)
    except Diverged as e:
        if e.draw:
            raise UserError(f"{step}: {e}, also after going back to a checkpoint; {remedy}") from e
        say(f"{step}: {e}; going back to the last checkpoint, with different noise")
    return going_back_once(step, attempt, remedy, say, draw=1)
