"""Large teachers: the ranks are divided into teams of consecutive ranks, and each team trains one teacher at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from math import inf
from typing import Any

import torch
import torch.distributed as dist

from gdd_dist.runtime.groups import Ranks, Vote
from gdd_dist.runtime.signals import Preempted, asked
from gdd_dist.runtime.world import World


class Team(Ranks):
    """This rank's team; ``rank`` is the rank in the team. Its leader, rank 0, takes jobs and reads and writes all files, because
    members may run on a host without these files. Teams run independently; all ranks of a team make the same calls.
    """

    def __init__(self, world: World, size: int) -> None:
        self._world, self.size, self.rank = world, size, world.rank % size
        self.count = world.size // size
        self.device = world.device
        self.group: Any = world.cut(size) if size > 1 else None

    def queue(self, jobs: int) -> Iterator[int]:
        """Yield job numbers 0 … jobs - 1, each to one team, the next free one. All ranks of all teams call it."""
        take = self._world.counter()
        while True:
            self._voted = inf
            stop, taken = Vote(asked.number, take() if self.is_main else 0, self.size, self.group).result()
            if stop:
                raise Preempted
            if taken >= jobs:
                return
            yield taken

    def broadcast(self, value: Any = None) -> Any:
        """Return the leader's ``value`` (anything that JSON can hold) on every rank."""
        return json.loads(self.send(json.dumps(value).encode()))

    def send(self, data: bytes) -> bytes:
        """Return the leader's ``data`` (not empty) on every rank."""
        if self.size == 1:
            return data
        leader = self._world.rank - self.rank
        size = torch.tensor([len(data)])
        dist.broadcast(size, leader, self.group)
        here = bytearray(data) if self.is_main else bytearray(int(size))
        dist.broadcast(torch.frombuffer(here, dtype=torch.uint8), leader, self.group)
        return bytes(here)
