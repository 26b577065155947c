"""How ranks that take a step together agree whether to save after it, and whether to stop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist

from gdd_dist.runtime.monitor import say
from gdd_dist.runtime.signals import Preempted, asked


class Group:
    """Ranks that take steps together: all of the run, or a team. ``rank`` counts within it; ``group``: of its collectives."""

    rank: int
    size: int
    group: Any

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes what is written once."""
        return self.rank == 0

    def say(self, line: str) -> None:
        """A line for the user, from rank 0; none when it is empty."""
        if line and self.is_main:
            say(line)

    def mean(self, values: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """The means over ranks of scalar tensors (one all-reduce, which all ranks must join)."""
        stacked = torch.stack([v.detach().float() for v in values.values()])
        if self.size > 1:
            dist.all_reduce(stacked, group=self.group)
            stacked /= self.size
        return dict(zip(values, stacked.tolist(), strict=True))


class Vote:
    """One all-reduce of two numbers. It begins before a step and is read after it, so that it runs while the step does.

    All ranks of ``group`` (None: all there are) get the same answer at the same step, whenever the signal reached each of them.
    """

    def __init__(self, number: int, word: int, size: int, group: Any = None) -> None:
        self._flags = torch.tensor([number, int(word)])
        self._work: Any = None
        if size > 1:
            self._work = dist.all_reduce(self._flags, op=dist.ReduceOp.MAX, group=group, async_op=True)

    def result(self) -> tuple[bool, int]:
        """(whether to save and stop now, the largest word: whether to save)."""
        if self._work is not None:
            self._work.wait()
        number, word = self._flags.tolist()
        if self._work is None:  # nobody to agree with: a signal that came in this step counts at once
            number = asked.number
        asked.agreed = number > 0
        if number:
            asked.note(number)
        return asked.agreed, word

    def obey(self, save: Callable[[], None], sound: bool = True) -> None:
        """Call ``save`` where that was wanted and what there is to save is ``sound``, or where the job is to stop.

        Then, in the latter case, raise Preempted.
        """
        stop, wanted = self.result()
        if stop or (wanted and sound):
            save()
        if stop:
            raise Preempted
