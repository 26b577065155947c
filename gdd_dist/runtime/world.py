"""Ranks: who we are, who does what, how we agree. Agreement goes through the rendezvous store as JSON, so ranks that run
apart for minutes never stand in a collective, and nothing is unpickled.
"""

from __future__ import annotations

import copy
import datetime
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist

from gdd_dist.runtime.devices import allow_tf32, backend, check_identities, choose_kernels, identity, pick_device
from gdd_dist.runtime.groups import mean_over_ranks, on_loopback
from gdd_dist.runtime.heartbeat import Pulse, describe, lives
from gdd_dist.runtime.monitor import say
from gdd_dist.runtime.process_identity import place
from gdd_dist.runtime.rendezvous import claim_before_joining, meet, second_connection
from gdd_dist.runtime.signals import LONGEST_GRACE, PeerError, Preempted, asked
from gdd_dist.runtime.vote import Vote

_POLL = 0.002
_COLLECTIVE = 1800.0
"""Seconds that a collective may take, or more with a longer --timeout. A rank that is gone is noticed by its heartbeat; this limit
ends a collective that hangs for another reason."""

_LATER = 5.0
"""Seconds by which the word to stop may reach a rank later than another."""

_SILENT = 10
"""Signs of life that a rank of another host misses before it counts as gone when a connection broke."""


class World:
    """All ranks of this run. ``size`` 1 without torchrun: then nothing here waits for anybody. Several must `join` first."""

    def __init__(self, device: str = "auto", timeout: float = 600.0, deterministic: bool = False) -> None:
        self.rank, self.size, self.local_rank, self.local_size = place()
        self.timeout = timeout
        self._limit = datetime.timedelta(seconds=max(_COLLECTIVE, timeout))
        self.group: Any = None  # of collectives: torch's default, all ranks
        self.device = pick_device(device, self.local_rank, self.local_size)
        self.step = "start"
        self.on_preempted: Callable[[], None] = lambda: None
        self._store: Any = None
        self._pulse: Pulse | None = None
        self._round, self._scope, self._voted = 0, "", time.monotonic()
        torch.set_num_threads(self.threads)
        allow_tf32(False)
        choose_kernels(deterministic)

    def join(self) -> World:
        """Meet the other ranks, then form the process group with them; returns this world.

        Whoever reports faults must know this world before: a rank that fails from here on tells the others through it.
        Nobody leaves before all have formed the group: a later fault is then seen in the store, not as a broken connection.
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
        """Cut the ranks into groups of ``size`` (it divides them) consecutive ones; this rank's process group. All ranks call it."""
        groups = [self._form(range(r, r + size)) for r in range(0, self.size, size)]
        return groups[self.rank // size]

    def _form(self, ranks: Sequence[int]) -> Any:
        with on_loopback(self.local_size == dist.get_world_size()):
            return dist.new_group(list(ranks), timeout=self._limit)

    def part(self, ranks: Sequence[int]) -> World:
        """Some ranks as a world of their own, numbered from 0, for what they alone do; on the others its ``rank`` is -1.

        All ranks call it. The others wait for them in `gather`, where they hear of a fault, and of a job that is to stop.
        """
        self._round += 1
        part = copy.copy(self)
        part.rank, part.size = (ranks.index(self.rank) if self.rank in ranks else -1), len(ranks)
        part.group, part._scope, part._round = self._form(ranks), f"{self._scope}part/{self._round}/", 0
        if part.rank < 0:
            asked.allow(LONGEST_GRACE)  # as long as a step of the others may take, which this rank does not see
        return part

    @property
    def threads(self) -> int:
        """CPU threads of this rank: its share of the cores it may use; fewer where OMP_NUM_THREADS says so."""
        share = max(1, len(os.sched_getaffinity(0)) // self.local_size)
        asked = os.environ.get("OMP_NUM_THREADS", "")
        if "TORCHELASTIC_RUN_ID" in os.environ or not asked.isdigit() or int(asked) == 0:
            return share  # torchrun itself sets it to 1 where the user has set nothing
        return min(share, int(asked))

    def enter(self, step: str) -> None:
        """From now on this rank is at ``step``: the others name that step if they miss this rank."""
        self.step = step
        if self._pulse is not None:
            self._pulse.beat(self._store)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes what is written once."""
        return self.rank == 0

    def gather(self, value: Any = None) -> list[Any]:
        """Every rank's ``value`` (anything JSON holds), in rank order, on every rank. Also a barrier."""
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
        """Poll, so that a peer's failure is seen at once and a busy peer may take as long as it needs.

        Who waits for long polls seldom: hundreds of ranks ask one host.
        """
        wait, begin = _POLL, time.monotonic()
        while True:
            # This rank has given its value, so the others may be able to complete the gather: it may stop only where one of
            # them has left without giving its own.
            hopeless = self.stopping and self._store.check(["leaving"])
            if self._store.check([key]):
                value: bytes = self._store.get(key)
                return value
            self._check_peers()
            if hopeless:
                self.check_stop()
            time.sleep(wait)
            wait = min(wait * 1.5, max(0.1, min(1.0, 0.02 * (time.monotonic() - begin))))

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.gather()

    def broadcast(self, value: Any = None) -> Any:
        """Rank 0's ``value`` (anything JSON holds), on every rank."""
        return self.gather(value if self.is_main else None)[0]

    def sum(self, value: int) -> int:
        """The sum of ``value`` over ranks."""
        return int(sum(self.gather(value)))

    def queue(self, jobs: int) -> Iterator[int]:
        """Job numbers 0 … jobs - 1, each given to exactly one rank, to whoever is free next. All ranks must call it alike."""
        take = self.counter()
        while (taken := take()) < jobs:
            self.check_stop()
            yield taken

    def counter(self) -> Callable[[], int]:
        """Counts from 0, over all ranks together: no two calls get the same number. All ranks must ask for it alike."""
        self._round += 1
        key, alone = f"{self._scope}queue/{self._round}", itertools.count()

        def take() -> int:
            self._check_peers()
            return next(alone) if self.size == 1 else int(self._store.add(key, 1)) - 1

        return take

    @property
    def stopping(self) -> bool:
        """Whether this rank knows that the job was asked to stop; in a step that ranks take together, ask `vote` instead."""
        return bool(asked.number)

    def check_stop(self) -> None:
        """Raise Preempted when the job was asked to stop: where ranks run apart, and have saved what they want to keep."""
        if self.stopping:
            asked.agreed = True
            self._leave()
            raise Preempted

    def _leave(self) -> None:
        """Tell those who wait for this rank that it will not come."""
        if self._store is not None:
            with suppress(RuntimeError):  # the store's host is gone
                self._store.set("leaving", str(self.rank))

    def vote(self, save: bool = False) -> Vote:
        """Begin to ask, at the start of a step that ranks take together: is any asked to stop, does rank 0 want to ``save``?"""
        now = time.monotonic()
        asked.allow(now - self._voted)
        self._voted = now
        return Vote(asked.number, save and self.is_main, self.size, self.group)

    def settle(self) -> bool:
        """After Preempted: wait until all ranks have saved, let rank 0 call ``on_preempted``, leave together.

        False when a rank does not come within the time to agree: then rank 0 has not called it.
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
            self._all_at("gone", self.size - 1, add=0)  # rank 0 goes last: it may host the store
            return True
        noted = self._all_at("noted", 1, add=0)
        return noted and self._all_at("gone", 0)

    def _all_at(self, key: str, wanted: int, add: int = 1) -> bool:
        """Add to a count and wait for it to reach ``wanted``, as long as ranks have to agree to stop."""
        deadline = time.monotonic() + asked.grace + _LATER
        try:
            here = self._store.add(key, add)
            while here < wanted and not self.failed() and time.monotonic() < deadline:
                time.sleep(0.02)
                here = self._store.add(key, 0)
        except RuntimeError:  # the store's host is gone
            return False
        return bool(here >= wanted)

    def mean(self, values: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """The means over ranks of scalar tensors (one all-reduce, which all ranks must join)."""
        return mean_over_ranks(values, self.size, self.group)

    def add(self, values: torch.Tensor) -> torch.Tensor:
        """A contiguous tensor becomes its sum over ranks, on all of them."""
        if self.size > 1:
            dist.all_reduce(values, group=self.group)
        return values

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over ranks of a tensor on the CPU, on rank 0; ranks that run apart meet in a barrier first."""
        if self.size > 1:
            dist.reduce(values, group=self.group, group_dst=0)
        return values

    def say(self, line: str) -> None:
        """A line for the user, from rank 0; none when it is empty."""
        if line and self.is_main:
            say(line)

    def failed(self) -> bool:
        """Whether a rank has failed, or the store's host is gone."""
        try:
            return self._store is not None and bool(self._store.check(["failed"]))
        except RuntimeError:
            return True

    def _check_peers(self) -> None:
        if self.failed():
            raise PeerError("another rank failed")

    def quiet(self) -> None:
        """This rank reports a fault itself: nobody else's is reported from now on."""
        if self._pulse is not None:
            self._pulse.quiet()

    def silent(self) -> str:
        """Who is gone, "" if nobody is: after a connection broke, whose it was.

        A process of this host can be looked up, however slow it is; one of another host gets time for several signs of life.
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
        """True for the first rank that fails: it reports; all others only say that they stopped. ``store``: another connection."""
        if self._store is None:
            return self.size == 1 or claim_before_joining()
        try:
            return bool((store or self._store).add("failed", 1) == 1)
        except RuntimeError:  # the store's host is gone: somebody else has failed before us
            return False

    def close(self) -> None:
        """Leave together: barrier, then destroy the group (gloo aborts at exit otherwise, now and then)."""
        if self.size > 1:
            self.barrier()
            assert self._pulse is not None
            self._pulse.close()
            dist.destroy_process_group()
            self._leave_store()

    def _leave_store(self) -> None:
        """Rank 0 goes last: without torchrun it hosts the store, which others still read in that last barrier."""
        deadline = time.monotonic() + self.timeout
        here = self._store.add("left", 0 if self.is_main else 1)
        while self.is_main and here < self.size - 1 and time.monotonic() < deadline:
            time.sleep(_POLL)
            here = self._store.add("left", 0)
