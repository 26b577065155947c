"""Which class, teacher, real sample and view stand in which slot of a matching step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gdd_dist.config.settings import Config
from gdd_dist.data.noise import uniform
from gdd_dist.data.order import Recent, dealt


@dataclass(frozen=True)
class Groups:
    """One rank's part of a global batch. G groups of n slots, B = G·n slots in group order.

    ``classes``, ``teachers``: int64 [G], the teachers as numbers in the cache; ``samples``, ``views``: int64 [B], the real side of each pair.
    """

    classes: np.ndarray
    teachers: np.ndarray
    samples: np.ndarray
    views: np.ndarray
    slots: np.ndarray

    @property
    def size(self) -> int:
        """n."""
        return len(self.slots) // len(self.classes)

    @property
    def labels(self) -> np.ndarray:
        """Class of each slot, int64 [B]."""
        return np.repeat(self.classes, self.size)

    def part(self, i: int, parts: int) -> Groups:
        """The i-th of equal ``parts``, whole groups each."""
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
        """The same groups in the order of their teachers, so that all slots of a teacher follow each other."""
        groups = np.argsort(self.teachers, kind="stable")
        slots = np.arange(len(self.slots)).reshape(-1, self.size)[groups].ravel()
        return Groups(
            self.classes[groups], self.teachers[groups], self.samples[slots], self.views[slots], self.slots[slots]
        )

    def runs(self) -> list[tuple[int, int]]:
        """(teacher, how many slots it has) of each run of groups with one teacher, in order."""
        firsts = np.flatnonzero(np.diff(self.teachers, prepend=-1))
        counts = np.diff(firsts, append=len(self.teachers)) * self.size
        return list(zip(self.teachers[firsts].tolist(), counts.tolist(), strict=True))


class Dealer:
    """Which class, teacher, real sample and view stand in which slot: a function of (seed, step, slot)."""

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
        # Of each class the block that is dealt, and the next one, since a group may meet a block's end.
        self._recent = Recent(2 * len(labels))

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Groups:
        """This rank's groups of global batch ``step``: classes and teachers come evenly, each class's samples once before any twice."""
        seed, n, share = self._seed, self._n, self._groups // world
        groups = np.arange(rank * share, (rank + 1) * share)
        places = step * self._groups + groups
        count = len(self._present)
        classes = self._present[dealt(seed, "matching/class", places, count)]
        teachers = self._teachers[dealt(seed, "matching/teacher", places, len(self._teachers))]
        samples = []
        for place, c in zip(places.tolist(), classes.tolist(), strict=True):
            members = self._members[c]
            turn = place // count  # how many groups of this class came before
            turns = np.arange(turn * n, (turn + 1) * n)
            samples.append(members[dealt(seed, f"matching/sample/{c}", turns, len(members), self._recent)])
        slots = np.arange(rank * share * n, (rank + 1) * share * n)
        views = (uniform(seed, "matching/view", step, slots, 1)[:, 0] * self._views).astype(np.int64)
        return Groups(classes, teachers, np.concatenate(samples), views, slots)
