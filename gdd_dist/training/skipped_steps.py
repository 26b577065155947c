"""Steps that moved nothing because a number was not finite: counted; after many in a row the loop goes back once, then ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from sharding.errors import UserError

LIMIT = 10
"""Steps in a row that may be skipped."""
_ANOTHER = 2**32
Result = TypeVar("Result")


class Diverged(Exception):
    """LIMIT steps in a row were skipped. ``draw``: of the noise that they saw."""

    def __init__(self, draw: int) -> None:
        super().__init__(f"{LIMIT} steps in a row had a loss or gradient that is not finite")
        self.draw = draw


class Skips:
    """Skipped steps of one loop. ``draw``: which noise it sees, another one after it went back.

    Whether a step moved is known on the device long after the host has asked for it. So the host reads it when the next step is
    noted, or earlier when somebody asks how many were skipped: what is saved, and what is reported, is never late.
    """

    def __init__(self) -> None:
        self.draw = 0
        self._total, self._in_a_row, self._news = 0, 0, False
        self._unread: Callable[[], bool] | None = None

    def note(self, moved: Tensor) -> None:
        """A step was taken, or skipped: a bool scalar. Raises Diverged at the LIMIT-th skipped in a row."""
        self.settle()
        self._unread = on_its_way(moved)
        if moved.device.type == "cpu":
            self.settle()

    def settle(self) -> None:
        """Count the last step too; waits for the device. Raises Diverged as ``note``."""
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
        """Steps skipped so far."""
        self.settle()
        return self._total

    @property
    def in_a_row(self) -> int:
        """Of them the last ones, after which no step moved."""
        self.settle()
        return self._in_a_row

    def seed(self, seed: int) -> int:
        """The seed of this loop's noise, where ``seed`` is that of an undisturbed one."""
        return seed + self.draw * _ANOTHER

    def line(self, step: str, done: int) -> str:
        """What to say, once, of a skipped step, "" of those that follow it; ``done``: steps noted in all. Waits for nothing."""
        if not self._news:
            return ""
        self._news, number = False, done - 1 - (self._unread is not None)
        return f"{step}: step {number} skipped on all ranks, its loss or gradient is not finite ({self._total} in all)"

    def state_dict(self) -> dict[str, int]:
        """For a checkpoint."""
        return {"total": self.total, "in_a_row": self.in_a_row, "draw": self.draw}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What ``state_dict`` gave."""
        self._total, self._in_a_row, self.draw = state["total"], state["in_a_row"], state["draw"]


def on_its_way(moved: Tensor) -> Callable[[], bool]:
    """Send a bool scalar to the host; calling what is returned waits until it is there, and says it."""
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
    """``attempt(0)``; when it diverges ``attempt(1)``, which goes on from the last checkpoint with another draw of noise.

    Raises UserError, with a ``remedy``, when that diverges too.
    """
    try:
        return attempt(draw)
    except Diverged as e:
        if e.draw:
            raise UserError(f"{step}: {e}, after going back to a checkpoint too; {remedy}") from e
        say(f"{step}: {e}; going back to the last checkpoint, with another draw of noise")
    return going_back_once(step, attempt, remedy, say, draw=1)
