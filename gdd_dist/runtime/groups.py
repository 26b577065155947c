"""Process groups: their network interface, the ranks that they connect, and sums and means over them."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gdd_dist.runtime.monitor import say
from gdd_dist.runtime.vote import Vote


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


class Ranks(ABC):
    """Ranks that work together: the World, or a Team. ``rank``: this one's number of ``size``; ``group``: None for all ranks of the run."""

    rank: int
    size: int
    group: Any

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes everything that is written once."""
        return self.rank == 0

    @abstractmethod
    def vote(self, save: bool = False) -> Vote:
        """Begin a vote at the start of a joint training step: was any rank asked to stop, does rank 0 want to ``save``?"""

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
