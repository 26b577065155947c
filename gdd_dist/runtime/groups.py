"""Process groups: their network interface, the ranks that they connect, their sums and means, and how they agree to save or to stop."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from math import inf
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gdd_dist.runtime.monitor import say
from gdd_dist.runtime.signals import Preempted, asked


@contextmanager
def on_loopback(wanted: bool) -> Iterator[None]:
    """If all ranks are on this host, listen only on loopback, unless the user has chosen an interface."""
    name = "GLOO_SOCKET_IFNAME"
    up = False
    with suppress(OSError, ValueError):
        up = bool(int(Path("/sys/class/net/lo/flags").read_text(), 16) & 1)
    if not wanted or name in os.environ or not up:
        yield
        return
    os.environ[name] = "lo"
    try:
        yield
    finally:
        del os.environ[name]


def mean_over_ranks(values: Mapping[str, torch.Tensor], size: int, group: Any = None) -> dict[str, float]:
    """Return the means of scalar tensors over the ``size`` ranks of ``group`` (None: all ranks). All of them call it."""
    stacked = torch.stack([v.detach().float() for v in values.values()])
    if size > 1:
        dist.all_reduce(stacked, group=group)
        stacked /= size
    return dict(zip(values, stacked.tolist(), strict=True))


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
        """Call ``save`` if a vote asked for it and the state is ``sound`` (called only then). If the job must stop, save, raise Preempted."""
        stop, wanted = self.result()
        if stop or (wanted and sound()):
            save()
        if stop:
            raise Preempted


class Ranks:
    """Ranks that work together: the World, or a Team. ``rank``: this one's number of ``size``; ``group``: None for all ranks of the run."""

    rank: int
    size: int
    group: Any
    _voted = inf
    """When this rank voted last, by time.monotonic; infinite if the time since then is not that of a step."""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes everything that is written once."""
        return self.rank == 0

    def vote(self, save: bool = False) -> Vote:
        """Begin a vote at the start of a joint training step: was any rank asked to stop, does rank 0 want to ``save``?

        The time since the last vote, that of a step, tells how long the ranks may take to agree to stop.
        """
        now = time.monotonic()
        asked.allow(now - self._voted)
        self._voted = now
        return Vote(asked.number, save and self.is_main, self.size, self.group)

    def say(self, line: str) -> None:
        """Print a line for the user, from rank 0; an empty line is not printed."""
        if line and self.is_main:
            say(line)

    def mean(self, values: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """Return the means over ranks of scalar tensors, by one all-reduce. All ranks call it."""
        return mean_over_ranks(values, self.size, self.group)

    def add(self, values: torch.Tensor) -> torch.Tensor:
        """Replace a contiguous tensor by its sum over ranks, on all ranks."""
        if self.size > 1:
            dist.all_reduce(values, group=self.group)
        return values

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum over ranks of a CPU tensor, on rank 0; a barrier first waits for ranks that work independently."""
        if self.size > 1:
            dist.reduce(values, group=self.group, group_dst=0)
        return values
