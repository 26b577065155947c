"""Estimates the remaining time of a whole run: its remaining images, at the average speed so far."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from sharding.progress import duration

FIRST_LOOK = 10.0
"""Seconds of work before the first estimate."""


class Outlook:
    """Estimates from ``images``: how many images each unfinished step forwards over all ranks, in the order of steps.

    An image takes longer in some steps than in others, so early estimates can be wrong by a factor of two. They improve during
    the run. ``done``: images that this step has forwarded so far; ``clock``: seconds.
    """

    def __init__(
        self, images: Mapping[str, int], done: Callable[[], int], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._left, self._done, self._clock = dict(images), done, clock
        self._step, self._seconds, self._images, self._begin = "", 0.0, 0, 0.0

    def begin(self, step: str) -> None:
        """Begin to count ``step``, unless it is finished."""
        self._step, self._begin = step, self._clock()

    def end(self, step: str) -> None:
        """Record that ``step`` is finished. If it forwarded images, they and its time count in the speed."""
        if images := self._done():
            self._images += images
            self._seconds += self._clock() - self._begin
        self._left.pop(step, None)

    def seconds(self, loop: float = 0.0) -> float | None:
        """Return the seconds until the run ends; None if there is no estimate yet. ``loop``: seconds that this step takes at least."""
        done, spent = self._done(), self._seconds + self._clock() - self._begin
        images = self._images + done
        if spent < FIRST_LOOK or not images:
            return None
        here = max(self._left.get(self._step, 0) - done, 0)
        later = sum(n for step, n in self._left.items() if step != self._step)
        return max(here * spent / images, loop) + later * spent / images

    def __call__(self, loop: float = 0.0) -> str:
        """Return the text for progress lines; empty if there is no estimate yet, or nothing is left. ``loop``: as of `seconds`."""
        seconds = self.seconds(loop)
        return "" if not seconds else f"whole run: about {duration(seconds)} left"
