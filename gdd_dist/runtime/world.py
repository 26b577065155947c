"""The ranks of a run: their numbers, devices, work and communication. They communicate through the rendezvous store as JSON,
so that ranks that work independently for minutes do not wait in a collective, and nothing is unpickled.
"""

from __future__ import annotations

import copy
import datetime
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist

from gdd_dist.runtime.devices import (
    allow_tf32,
    backend,
    check_identities,
    choose_kernels,
    identity,
    keep_freed_memory,
    pick_device,
)
from gdd_dist.runtime.groups import Ranks, on_loopback
from gdd_dist.runtime.heartbeat import Pulse, describe, lives
from gdd_dist.runtime.process_identity import place
from gdd_dist.runtime.rendezvous import claim_before_joining, meet, second_connection
from gdd_dist.runtime.signals import LONGEST_GRACE, PeerError, Preempted, asked

_POLL = 0.002
_COLLECTIVE = 1800.0
"""Seconds that a collective may take, or more with a longer --timeout. Heartbeats notice a lost rank; this limit ends a
collective that hangs for another reason."""
_LATER = 5.0
"""Seconds by which the request to stop may reach one rank later than another."""
_SILENT = 10
"""Heartbeats that a rank of another host must miss before it is treated as lost, after a connection broke."""


class World(Ranks):
    """All ranks of this run. Without torchrun ``size`` is 1, and nothing here waits. Several ranks must `join` first."""

    def __init__(self, device: str = "auto", timeout: float = 600.0, deterministic: bool = False) -> None:
        self.rank, self.size, self.local_rank, self.local_size = place()
        self.timeout = timeout
        self._limit = datetime.timedelta(seconds=max(_COLLECTIVE, timeout))
        self.group: Any = None  # for collectives; None is torch's default group of all ranks
        self.device = pick_device(device, self.local_rank, self.local_size)
        self.step = "start"
        self.on_preempted: Callable[[], None] = lambda: None
        self._store: Any = None
        self._pulse: Pulse | None = None
        self._round, self._scope, self._voted = 0, "", time.monotonic()
        torch.set_num_threads(self.threads)
        keep_freed_memory()
        allow_tf32(False)
        choose_kernels(deterministic)

    def join(self) -> World:
        """Join the other ranks, then form the process group with them; returns this world.

        The code that reports faults must know this world first, because a rank that fails from here on informs the others
        through it. No rank returns before all are in the group, so later faults appear in the store, not as broken connections.
        """
        if self.size == 1:
            return self
        self._store = meet(self.rank, self.size, self.timeout)
        second = second_connection(self._store)
        self._pulse = Pulse(second, self.rank, self.size, self.timeout, lambda: self.step, self.claim_failure)
        check_identities(self.gather(identity(self.device)), self.local_size)
        store = dist.PrefixStore("gdd", self._store)
        with on_loopback(self.local_size == self.size):
            here: dict[str, Any] = {"store": store, "rank": self.rank, "world_size": self.size}
            dist.init_process_group(backend(self.device), **here, timeout=self._limit)
        self.barrier()
        return self

    def cut(self, size: int) -> Any:
        """Split the ranks into groups of ``size`` consecutive ranks; return this rank's process group. All ranks call it."""
        groups = [self._form(range(r, r + size)) for r in range(0, self.size, size)]
        return groups[self.rank // size]

    def _form(self, ranks: Sequence[int]) -> Any:
        with on_loopback(self.local_size == dist.get_world_size()):
            return dist.new_group(list(ranks), timeout=self._limit)

    def part(self, ranks: Sequence[int]) -> World:
        """Return a world of only ``ranks``, numbered from 0, for work that only they do; on the others its ``rank`` is -1.

        All ranks call it. The others wait for them in `gather`, where they learn of faults and of requests to stop.
        """
        self._round += 1
        part = copy.copy(self)
        part.rank, part.size = (ranks.index(self.rank) if self.rank in ranks else -1), len(ranks)
        part.group, part._scope, part._round = self._form(ranks), f"{self._scope}part/{self._round}/", 0
        if part.rank < 0:
            asked.allow(LONGEST_GRACE)  # the longest time of a step of the others, which this rank does not measure
        return part

    @property
    def threads(self) -> int:
        """Return the number of CPU threads of this rank: its share of the usable cores, or fewer if OMP_NUM_THREADS is lower."""
        share = max(1, len(os.sched_getaffinity(0)) // self.local_size)
        asked = os.environ.get("OMP_NUM_THREADS", "")
        if "TORCHELASTIC_RUN_ID" in os.environ or not asked.isdecimal() or int(asked) == 0:
            return share  # torchrun sets it to 1 if the user has not set it
        return min(share, int(asked))

    def enter(self, step: str) -> None:
        """Record that this rank is in ``step``; the others name that step if this rank is lost."""
        self.step = step
        if self._pulse is not None:
            self._pulse.beat(self._store)

    def gather(self, value: Any = None) -> list[Any]:
        """Return every rank's ``value`` (anything that JSON can hold), in rank order, on every rank. Also a barrier."""
        if self.size == 1:
            return [value]
        self._round += 1
        key = f"{self._scope}gather/{self._round}"
        self._store.set(f"{key}/{self.rank}", json.dumps(value))
        if self.is_main:
            everything = [json.loads(self._wait(f"{key}/{r}")) for r in range(self.size)]
            self._store.set(key, json.dumps(everything))
        result: list[Any] = json.loads(self._wait(key))
        self._store.delete_key(f"{key}/{self.rank}")
        return result

    def _wait(self, key: str) -> bytes:
        """Poll, so that a peer's failure is noticed at once; less often in long waits, because hundreds of ranks may ask one host."""
        wait, begin = _POLL, time.monotonic()
        while True:
            # This rank has written its value, so the others may still complete the gather: it may stop only if one of them
            # has left without writing its own.
            hopeless = asked.number and self._store.check(["leaving"])
            if self._store.check([key]):
                return self._store.get(key)
            self._check_peers()
            if hopeless:
                self.check_stop()
            time.sleep(wait)
            wait = min(wait * 1.5, max(0.1, min(1.0, 0.02 * (time.monotonic() - begin))))

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.gather()

    def broadcast(self, value: Any = None) -> Any:
        """Return rank 0's ``value`` (anything that JSON can hold) on every rank."""
        return self.gather(value if self.is_main else None)[0]

    def sum(self, value: int) -> int:
        """Return the sum of ``value`` over ranks."""
        return int(sum(self.gather(value)))

    def queue(self, jobs: int) -> Iterator[int]:
        """Yield job numbers 0 … jobs - 1, each to one rank, the next free one. All ranks must call it in the same order."""
        take = self.counter()
        while (taken := take()) < jobs:
            self.check_stop()
            yield taken

    def counter(self) -> Callable[[], int]:
        """Return a counter from 0 that all ranks share: no two calls get the same number. All ranks call it in the same order."""
        self._round += 1
        key, alone = f"{self._scope}queue/{self._round}", itertools.count()

        def take() -> int:
            self._check_peers()
            return next(alone) if self.size == 1 else int(self._store.add(key, 1)) - 1

        return take

    def check_stop(self) -> None:
        """Raise Preempted if the job was asked to stop; for ranks that work independently (others `vote`) and have saved their progress."""
        if asked.number:
            asked.agreed = True
            self._leave()
            raise Preempted

    def _leave(self) -> None:
        """Tell the ranks that wait for this rank that it stops."""
        if self._store is not None:
            with suppress(RuntimeError):  # the store's host was lost
                self._store.set("leaving", str(self.rank))

    def settle(self) -> bool:
        """After Preempted: wait until all ranks have saved, let rank 0 call ``on_preempted``, and exit together.

        Return False if a rank does not arrive in time; rank 0 has then not called it.
        """
        if self.size == 1:
            self.on_preempted()
            return True
        self.quiet()
        self._leave()
        if not self._all_at("saved", self.size):
            return False
        if self.is_main:
            self.on_preempted()
            self._store.add("noted", 1)
            self._all_at("gone", self.size - 1, add=0)  # rank 0 exits last, because it may host the store
            return True
        noted = self._all_at("noted", 1, add=0)
        return noted and self._all_at("gone", 0)

    def _all_at(self, key: str, wanted: int, add: int = 1) -> bool:
        """Add to a counter and wait until it reaches ``wanted``, within the time that ranks have to agree to stop."""
        deadline = time.monotonic() + asked.grace + _LATER
        try:
            here = self._store.add(key, add)
            while here < wanted and not self.failed() and time.monotonic() < deadline:
                time.sleep(0.02)
                here = self._store.add(key, 0)
        except RuntimeError:  # the store's host was lost
            return False
        return bool(here >= wanted)

    def failed(self) -> bool:
        """Whether a rank has failed, or the store's host was lost."""
        try:
            return self._store is not None and bool(self._store.check(["failed"]))
        except RuntimeError:
            return True

    def _check_peers(self) -> None:
        if self.failed():
            raise PeerError("another rank failed")

    def quiet(self) -> None:
        """This rank reports a fault itself, so it no longer reports faults of others."""
        if self._pulse is not None:
            self._pulse.quiet()

    def silent(self) -> str:
        """Return the lost ranks, "" if there are none: after a connection broke, this finds whose connection it was.

        A process of this host can be looked up, even if it is slow; one of another host gets time for several heartbeats.
        """
        if self._pulse is None:
            return ""
        try:
            others = [r for r in range(self.size) if r != self.rank]
            before = now = self._pulse.read(others)
            for _ in range(_SILENT):
                unknown = [r for r in others if lives(now[r]) is None and now[r] == before[r]]
                if not unknown:
                    break
                time.sleep(self._pulse.interval)
                now = self._pulse.read(others)
        except RuntimeError:
            return f"the host of rank 0 ({os.environ.get('MASTER_ADDR', 'unknown')})"
        gone = [r for r in others if lives(now[r]) is False or (lives(now[r]) is None and now[r] == before[r])]
        return ", ".join(describe(r, now[r]) for r in gone)

    def claim_failure(self, store: Any = None) -> bool:
        """Return True for the first failing rank, which reports the fault; the others only print that they stopped."""
        if self._store is None:
            return self.size == 1 or claim_before_joining()
        try:
            return bool((store or self._store).add("failed", 1) == 1)
        except RuntimeError:  # the store's host was lost, so another rank failed first
            return False

    def close(self) -> None:
        """Exit together: barrier, then destroy the group (without this, gloo sometimes aborts at exit)."""
        if self.size > 1:
            self.barrier()
            assert self._pulse is not None
            self._pulse.close()
            dist.destroy_process_group()
            self._leave_store()

    def _leave_store(self) -> None:
        """Let rank 0 exit last: without torchrun it hosts the store, which the others still read in the last barrier."""
        deadline = time.monotonic() + self.timeout
        here = self._store.add("left", 0 if self.is_main else 1)
        while self.is_main and here < self.size - 1 and time.monotonic() < deadline:
            time.sleep(_POLL)
            here = self._store.add("left", 0)
