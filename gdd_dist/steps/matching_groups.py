"""Assigns class, teacher, real sample and view to each slot of a matching step; a slot is a position in the global batch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gdd_dist.config.settings import Config
from gdd_dist.data.noise import uniform
from gdd_dist.data.order import Recent, dealt


@dataclass(frozen=True)
class Groups:
    """One rank's part of a global batch: G groups of n slots, B = G·n slots in group order.

    ``classes``, ``teachers``: int64 [G], teachers by their number in the cache; ``samples``, ``views``: int64 [B], of each pair's real image.
    """

    classes: np.ndarray
    teachers: np.ndarray
    samples: np.ndarray
    views: np.ndarray
    slots: np.ndarray

    @property
    def size(self) -> int:
        """The number of slots per group, n."""
        return len(self.slots) // len(self.classes)

    @property
    def labels(self) -> np.ndarray:
        """The class of each slot, int64 [B]."""
        return np.repeat(self.classes, self.size)

    def part(self, i: int, parts: int) -> Groups:
        """Return the i-th of ``parts`` equal parts, each of whole groups."""
        g, n = len(self.classes) // parts, len(self.slots) // parts
        of_groups, of_slots = slice(i * g, (i + 1) * g), slice(i * n, (i + 1) * n)
        return Groups(
            self.classes[of_groups],
            self.teachers[of_groups],
            self.samples[of_slots],
            self.views[of_slots],
            self.slots[of_slots],
        )

    def by_teacher(self) -> Groups:
        """Return the groups sorted by teacher, so that all slots of a teacher are consecutive."""
        groups = np.argsort(self.teachers, kind="stable")
        slots = np.arange(len(self.slots)).reshape(-1, self.size)[groups].ravel()
        return Groups(
            self.classes[groups], self.teachers[groups], self.samples[slots], self.views[slots], self.slots[slots]
        )

    def runs(self) -> list[tuple[int, int]]:
        """Return (teacher, number of slots) of each run of groups with one teacher, in order."""
        firsts = np.flatnonzero(np.diff(self.teachers, prepend=-1))
        counts = np.diff(firsts, append=len(self.teachers)) * self.size
        return list(zip(self.teachers[firsts].tolist(), counts.tolist(), strict=True))


class Dealer:
    """Assigns class, teacher, real sample and view to slots, as a function of (seed, step, slot)."""

    def __init__(self, config: Config, labels: np.ndarray, teachers: np.ndarray, views: int) -> None:
        m = config.matching
        self._seed, self._n, self._groups, self._teachers, self._views = (
            config.step_seed("matching"),
            m.group,
            m.batch // m.group,
            teachers,
            views,
        )
        self._present = np.unique(labels)
        self._members = {int(c): np.flatnonzero(labels == c) for c in self._present}
        # For each class the current block of samples and the next one, because a group may cross the end of a block.
        self._recent = Recent(2 * len(labels))

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Groups:
        """Return this rank's groups of global batch ``step``: classes, teachers and the samples of each class are balanced."""
        seed, n, share = self._seed, self._n, self._groups // world
        groups = np.arange(rank * share, (rank + 1) * share)
        places = step * self._groups + groups
        count = len(self._present)
        classes = self._present[dealt(seed, "matching/class", places, count)]
        teachers = self._teachers[dealt(seed, "matching/teacher", places, len(self._teachers))]
        samples = []
        for place, c in zip(places.tolist(), classes.tolist(), strict=True):
            members = self._members[c]
            turn = place // count  # number of earlier groups of this class
            turns = np.arange(turn * n, (turn + 1) * n)
            samples.append(members[dealt(seed, f"matching/sample/{c}", turns, len(members), self._recent)])
        slots = np.arange(rank * share * n, (rank + 1) * share * n)
        views = (uniform(seed, "matching/view", step, slots, 1)[:, 0] * self._views).astype(np.int64)
        return Groups(classes, teachers, np.concatenate(samples), views, slots)
