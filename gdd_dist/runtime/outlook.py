"""How long a whole run still takes: all its images, at the speed of those that are done."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from sharding.progress import duration

FIRST_LOOK = 10.0
"""Seconds of work before the first guess."""


class Outlook:
    """Guesses from ``images``: how many the networks of each unfinished step forward, by step in their order, over all ranks.

    An image takes longer in one step than in another, so early guesses can be wrong by a factor of two. They become right as
    the run goes on. ``done``: images that this step forwarded so far; ``clock``: seconds.
    """

    def __init__(
        self, images: Mapping[str, int], done: Callable[[], int], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._left, self._done, self._clock = dict(images), done, clock
        self._step, self._seconds, self._images, self._begin = "", 0.0, 0, 0.0

    def begin(self, step: str) -> None:
        """From now on ``step`` is computed, unless it is finished."""
        self._step, self._begin = step, self._clock()

    def end(self, step: str) -> None:
        """``step`` is finished. Where images were forwarded for it, they and its time count in the speed."""
        if images := self._done():
            self._images += images
            self._seconds += self._clock() - self._begin
        self._left.pop(step, None)

    def seconds(self) -> float | None:
        """Seconds until the run ends; None while nothing can be said."""
        done, spent = self._done(), self._seconds + self._clock() - self._begin
        images = self._images + done
        if spent < FIRST_LOOK or not images:
            return None
        here = max(self._left.get(self._step, 0) - done, 0)
        later = sum(n for step, n in self._left.items() if step != self._step)
        return (here + later) * spent / images

    def __str__(self) -> str:
        """What progress says of it; empty while nothing can be said, and where nothing is left."""
        seconds = self.seconds()
        return "" if not seconds else f"whole run: about {duration(seconds)} left"
