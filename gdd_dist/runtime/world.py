"""Ranks: who we are, who does what, how we agree. Agreement goes through the rendezvous store as JSON, so ranks that run
apart for minutes never stand in a collective, and nothing is unpickled.
"""

from __future__ import annotations

import datetime
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gdd_dist.runtime.devices import allow_tf32, backend, check_identities, choose_kernels, identity, pick_device
from gdd_dist.runtime.heartbeat import PEER_GRACE, Pulse, describe
from gdd_dist.runtime.monitor import say
from gdd_dist.runtime.process_identity import place
from gdd_dist.runtime.rendezvous import meet
from gdd_dist.runtime.signals import PeerError, Preempted, asked
from gdd_dist.runtime.vote import Vote
from sharding.errors import UserError

_POLL = 0.002
_COLLECTIVE = 1800.0
"""Seconds that a collective may take at least: who is gone is missed by its heartbeat, this ends what no one can explain."""

_LATER = 5.0
"""Seconds by which the word to stop may reach a rank later than another."""


class World:
    """All ranks of this run. ``size`` 1 without torchrun: then nothing here waits for anybody."""

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
        self._round, self._voted = 0, time.monotonic()
        torch.set_num_threads(self.threads)
        allow_tf32(False)
        choose_kernels(deterministic)
        if self.size > 1:
            self._join()

    def _join(self) -> None:
        """Meet the others, then form the process group. Nobody leaves before all have formed it: a fault of a rank that has
        is seen in the store by the others, who would otherwise meet it as a broken connection."""
        self._store = meet(self.rank, self.size, self.timeout)
        # A connection of its own: the main thread's may stand in a wait.
        self._pulse = Pulse(
            self._store.clone(), self.rank, self.size, self.timeout, lambda: self.step, self.claim_failure
        )
        check_identities(self.gather(identity(self.device)), self.local_size)
        store = dist.PrefixStore("gdd", self._store)
        with _on_loopback(self.local_size == self.size):
            try:
                dist.init_process_group(
                    backend(self.device), store=store, rank=self.rank, world_size=self.size, timeout=self._limit
                )
            except Exception as e:
                raise self._whose_fault(e) from e
        self.barrier()

    def _whose_fault(self, fault: Exception) -> Exception:
        """What to raise where the group could not be formed: ``fault`` on the first rank that reports it, PeerError on others."""
        deadline = time.monotonic() + PEER_GRACE * isinstance(fault, RuntimeError)  # as a broken connection is
        while not self.failed() and time.monotonic() < deadline:
            time.sleep(0.05)
        self.quiet()
        if isinstance(fault, RuntimeError) and not self.failed() and (gone := self.silent()):
            return UserError(f"{gone} is gone; run the same command again") if self.claim_failure() else PeerError(gone)
        return fault if self.claim_failure() else PeerError("another rank failed")

    def cut(self, size: int) -> Any:
        """Cut the ranks into groups of ``size`` (it divides them) consecutive ones; this rank's process group. All ranks call it."""
        firsts = range(0, self.size, size)
        with _on_loopback(self.local_size == self.size):
            groups = [dist.new_group(list(range(r, r + size)), timeout=self._limit) for r in firsts]
        return groups[self.rank // size]

    @property
    def threads(self) -> int:
        """CPU threads of this rank: its share of the cores it may use; fewer where OMP_NUM_THREADS says so."""
        share = max(1, len(os.sched_getaffinity(0)) // self.local_size)
        asked = os.environ.get("OMP_NUM_THREADS", "")
        if "TORCHELASTIC_RUN_ID" in os.environ or not asked.isdigit() or int(asked) == 0:
            return share  # torchrun itself sets it to 1 where the user has set nothing
        return min(share, int(asked))

    def enter(self, step: str) -> None:
        """From now on this rank is at ``step``: what others say of it should it be gone."""
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
        key = f"gather/{self._round}"
        self._store.set(f"{key}/{self.rank}", json.dumps(value))
        if self.is_main:
            everything = [json.loads(self._wait(f"{key}/{r}")) for r in range(self.size)]
            self._store.set(key, json.dumps(everything))
        result: list[Any] = json.loads(self._wait(key))
        self._store.delete_key(f"{key}/{self.rank}")
        return result

    def _wait(self, key: str) -> bytes:
        """Poll, so that a peer's failure is seen at once and a busy peer may take as long as it needs."""
        wait = _POLL
        while True:
            # Who has given his value stays, since the others may have all they wait for, unless one has left before giving his.
            hopeless = self.stopping and self._store.check(["leaving"])
            if self._store.check([key]):
                value: bytes = self._store.get(key)
                return value
            self._check_peers()
            if hopeless:
                self.check_stop()
            time.sleep(wait)
            wait = min(wait * 1.5, 0.1)

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
        key, alone = f"queue/{self._round}", itertools.count()

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
        return Vote(asked.number, save and self.is_main, self.size)

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
        return mean_over_ranks(values, self.size)

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
        """Who gave no sign of life since a moment ago, "" if all do: after a connection broke, whose it was."""
        if self._pulse is None:
            return ""
        try:
            others = [r for r in range(self.size) if r != self.rank]
            before = self._pulse.read(others)
            time.sleep(2.5 * self._pulse.interval)
            after = self._pulse.read(others)
        except RuntimeError:
            return f"the host of rank 0 ({os.environ.get('MASTER_ADDR', 'unknown')})"
        return ", ".join(describe(r, after[r]) for r in others if before[r] == after[r])

    def claim_failure(self, store: Any = None) -> bool:
        """True for the first rank that fails: it reports; all others only say that they stopped. ``store``: another connection."""
        if self._store is None:
            return True
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


@contextmanager
def _on_loopback(wanted: bool) -> Iterator[None]:
    """Ranks that are all on this host listen on loopback alone, unless the user has chosen an interface."""
    name = "GLOO_SOCKET_IFNAME"
    if not wanted or name in os.environ or not _loopback_is_up():
        yield
        return
    os.environ[name] = "lo"
    try:
        yield
    finally:
        del os.environ[name]


def _loopback_is_up() -> bool:
    try:
        return bool(int(Path("/sys/class/net/lo/flags").read_text(), 16) & 1)
    except (OSError, ValueError):
        return False


def mean_over_ranks(values: Mapping[str, torch.Tensor], size: int, group: Any = None) -> dict[str, float]:
    """The means of scalar tensors over the ``size`` ranks of ``group`` (None: all there are), which all join."""
    stacked = torch.stack([v.detach().float() for v in values.values()])
    if size > 1:
        dist.all_reduce(stacked, group=group)
        stacked /= size
    return dict(zip(values, stacked.tolist(), strict=True))
