"""How ranks that take a step together agree whether to save after it, and whether to stop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from gdd_dist.runtime.signals import Preempted, asked


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

    def obey(self, save: Callable[[], None], sound: Callable[[], bool] = lambda: True) -> None:
        """Call ``save`` where that was wanted and what there is to save is ``sound`` (asked then alone), or where the job is to stop.

        Then, in the latter case, raise Preempted.
        """
        stop, wanted = self.result()
        if stop or (wanted and sound()):
            save()
        if stop:
            raise Preempted
