"""How ranks that train together agree after each step whether to save, and whether to stop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from gdd_dist.runtime.signals import Preempted, asked


class Vote:
    """One all-reduce of two numbers. It begins before a step and is read after it, so that both run at the same time.

    All ranks of ``group`` (None: all ranks) get the same result at the same step, no matter when the signal reached them.
    """

    def __init__(self, number: int, word: int, size: int, group: Any = None) -> None:
        self._flags = torch.tensor([number, int(word)])
        self._work: Any = None
        if size > 1:
            self._work = dist.all_reduce(self._flags, op=dist.ReduceOp.MAX, group=group, async_op=True)

    def result(self) -> tuple[bool, int]:
        """Return (whether to save and stop now, the largest vote: whether to save)."""
        if self._work is not None:
            self._work.wait()
        number, word = self._flags.tolist()
        if self._work is None:  # a single rank: a signal during this step is effective at once
            number = asked.number
        asked.agreed = number > 0
        if number:
            asked.note(number)
        return asked.agreed, word

    def obey(self, save: Callable[[], None], sound: Callable[[], bool] = lambda: True) -> None:
        """Call ``save`` if saving was requested and the state is ``sound`` (called only then), or if the job must stop.

        If the job must stop, raise Preempted afterwards.
        """
        stop, wanted = self.result()
        if stop or (wanted and sound()):
            save()
        if stop:
            raise Preempted
