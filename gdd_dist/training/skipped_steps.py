"""Steps that moved nothing because a number was not finite: counted; after many in a row the loop goes back once, then ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

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
    """Skipped steps of one loop. ``draw``: which noise it sees, another one after it went back."""

    def __init__(self) -> None:
        self.total, self.in_a_row, self.draw = 0, 0, 0

    def note(self, moved: bool) -> None:
        """A step was taken, or skipped. Raises Diverged at the LIMIT-th skipped in a row."""
        self.in_a_row = 0 if moved else self.in_a_row + 1
        self.total += not moved
        if self.in_a_row >= LIMIT:
            raise Diverged(self.draw)

    def seed(self, seed: int) -> int:
        """The seed of this loop's noise, where ``seed`` is that of an undisturbed one."""
        return seed + self.draw * _ANOTHER

    def line(self, step: str, done: int) -> str:
        """What to say after a skipped step, "" after any other and after those that follow it."""
        if self.in_a_row != 1:
            return ""
        return f"{step}: step {done - 1} skipped on all ranks, its loss or gradient is not finite ({self.total} in all)"

    def state_dict(self) -> dict[str, int]:
        """For a checkpoint."""
        return {"total": self.total, "in_a_row": self.in_a_row, "draw": self.draw}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What ``state_dict`` gave."""
        self.total, self.in_a_row, self.draw = state["total"], state["in_a_row"], state["draw"]


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
