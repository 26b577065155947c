"""Large teachers: the ranks are cut into teams of consecutive ranks, each of which trains one teacher at a time, together."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gdd_dist.runtime.groups import mean_over_ranks
from gdd_dist.runtime.monitor import say
from gdd_dist.runtime.signals import Preempted, asked
from gdd_dist.runtime.vote import Vote
from gdd_dist.runtime.world import World


class Team:
    """This rank's team; ``rank`` counts within it. Its leader, rank 0, takes jobs, and reads and writes all files: members may
    stand on a host whose disk holds none of them. Teams run apart from each other; in a team all calls are made by all alike.
    """

    def __init__(self, world: World, size: int) -> None:
        self._world, self.size, self.rank = world, size, world.rank % size
        self.count = world.size // size
        self.device = world.device
        self.group: Any = world.cut(size) if size > 1 else None
        self._voted: float | None = None

    @property
    def is_main(self) -> bool:
        """Whether this rank is the leader."""
        return self.rank == 0

    def say(self, line: str) -> None:
        """A line for the user, from the leader; none when it is empty."""
        if line and self.is_main:
            say(line)

    def queue(self, jobs: int) -> Iterator[int]:
        """Job numbers 0 … jobs - 1, each given to exactly one team, to whichever is free next. All ranks of all teams call it."""
        take = self._world.counter()
        while True:
            self._voted = None
            stop, taken = Vote(asked.number, take() if self.is_main else 0, self.size, self.group).result()
            if stop:
                raise Preempted
            if taken >= jobs:
                return
            yield taken

    def vote(self, save: bool = False) -> Vote:
        """As `World.vote`, of this team's ranks."""
        now = time.monotonic()
        if self._voted is not None and self.size > 1:
            asked.allow(now - self._voted)
        self._voted = now
        return Vote(asked.number, save and self.is_main, self.size, self.group)

    def mean(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        """As `World.mean`, over this team."""
        return mean_over_ranks(values, self.size, self.group)

    def broadcast(self, value: Any = None) -> Any:
        """The leader's ``value`` (anything JSON holds), on every rank."""
        return json.loads(self.send(json.dumps(value).encode()))

    def send(self, data: bytes) -> bytes:
        """The leader's ``data`` (not empty), on every rank."""
        if self.size == 1:
            return data
        leader = self._world.rank - self.rank
        size = torch.tensor([len(data)])
        dist.broadcast(size, leader, self.group)
        here = bytearray(data) if self.is_main else bytearray(int(size))
        whole = torch.frombuffer(here, dtype=torch.uint8)
        dist.broadcast(whole, leader, self.group)
        return bytes(here)
