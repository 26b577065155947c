"""Heartbeats: a rank may be busy for hours, but one that is stopped or lost is noticed after ``timeout`` seconds.

A thread of each rank sends a heartbeat with the current step at short intervals. Rank 0 watches all ranks, and the others
watch rank 0. Each rank counts the seconds without a heartbeat itself, and only while it is running, so clocks of two hosts are
never compared, and no rank is reported after a whole job was suspended. The same thread passes on a request to stop.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

from gdd_dist.runtime.process_identity import born, local, me
from gdd_dist.runtime.signals import asked, end_with

PEER_GRACE = 5.0
"""Seconds in which the main thread can exit by itself after another rank has failed."""
END = "find out what stopped it, then run the same command again to continue from the last checkpoint"


class Watch:
    """How long each of ``ranks`` has sent no heartbeat; ``step`` is the longest time that one look may add."""

    def __init__(self, ranks: Iterable[int], step: float) -> None:
        self._seen: dict[int, bytes | None] = dict.fromkeys(ranks)
        self._ages = dict.fromkeys(self._seen, 0.0)
        self._step = step

    def look(self, beats: Mapping[int, bytes | None], passed: float) -> dict[int, float]:
        """Take the latest ``beats`` (None: none yet) and the seconds since the last look; return each rank's age in seconds."""
        for rank, last in self._seen.items():
            same = beats.get(rank) == last
            self._ages[rank] = self._ages[rank] + min(passed, self._step) if same else 0.0
            self._seen[rank] = beats.get(rank)
        return dict(self._ages)


class Pulse:
    """Sends this rank's heartbeats and watches those of others. ``where``: returns the step of this rank.

    ``claim``: returns whether this rank may report a fault. It uses this thread's connection, because the main thread may be
    waiting in its own connection.
    """

    def __init__(
        self, store: Any, rank: int, size: int, timeout: float, where: Callable[[], str], claim: Callable[[Any], bool]
    ) -> None:
        self._store, self._rank, self._size, self._timeout = store, rank, size, timeout
        self._where, self._claim = where, claim
        self.interval = min(1.0, timeout / 5)
        self._beats, self._known = 0, set[int]()
        self._watched = range(1, size) if rank == 0 else range(1)
        self._stop, self._quiet = threading.Event(), threading.Event()
        threading.Thread(target=self._run, daemon=True, name="pulse").start()
        threading.Thread(target=self._guard, daemon=True, name="guard").start()

    def quiet(self) -> None:
        """This rank reports a fault itself: it still sends heartbeats, but no longer reacts to missing ones."""
        self._quiet.set()

    def close(self) -> None:
        """Stop the thread, because this rank ends normally."""
        self._quiet.set()
        self._stop.set()

    def beat(self, store: Any) -> None:
        """Send a heartbeat now, through this connection."""
        store.set(f"beat/{self._rank}", json.dumps({**me(), "n": self._beats + 1, "step": self._where()}))
        self._beats += 1

    def read(self, ranks: Iterable[int]) -> dict[int, bytes | None]:
        """Return the last heartbeat of each rank, None if it never sent one."""
        ranks = list(ranks)
        self._known |= {r for r in ranks if r not in self._known and self._store.check([f"beat/{r}"])}
        here = [r for r in ranks if r in self._known]
        found = dict(zip(here, self._store.multi_get([f"beat/{r}" for r in here]), strict=True)) if here else {}
        return {r: found.get(r) for r in ranks}

    def _run(self) -> None:
        watch, last, told, failing = Watch(self._watched, 2 * self.interval), time.monotonic(), False, 0.0
        while not self._stop.is_set():
            try:
                self.beat(self._store)
                told = self._pass_on(told)
                failed = self._store.check(["failed"])
                now = time.monotonic()
                ages = watch.look(beats := self.read(self._watched), now - last)
            except RuntimeError:  # the store's host is gone
                failed, now, ages, beats = True, time.monotonic(), {}, {}
            if failed:
                failing += min(now - last, 2 * self.interval)
                if failing > PEER_GRACE and not self._quiet.is_set():
                    end_with(2, f"stopped: rank {self._rank}, because another rank failed")
            missing = [r for r, age in ages.items() if age > self._timeout]
            if missing and not failed and not self._quiet.is_set():
                self._miss(missing[0], beats[missing[0]])
            last = now
            (self._stop if asked.heard.is_set() else asked.heard).wait(self.interval)

    def _pass_on(self, told: bool) -> bool:
        """Tell the others that the job must stop, or learn it from them."""
        number = asked.number  # read once; a signal during the store access is passed on by the next call
        if number and not told:
            self._store.set("stop", str(number))
        elif not number and self._store.check(["stop"]):
            asked.note(int(self._store.get("stop")))
        return bool(number)

    def _miss(self, rank: int, beat: bytes | None) -> None:
        what = f"error: {describe(rank, beat)} has sent no heartbeat for {self._timeout:g} s; {END}"
        mine = self._claim(self._store)
        _kill_if_here(beat)
        end_with(2, what if mine else f"stopped: rank {self._rank}, because another rank failed")

    def _guard(self) -> None:
        """Exit when the store no longer responds, because its host or the connection to it was lost."""
        age, beats = 0.0, -1
        while not self._stop.wait(self.interval):
            age, beats = (age + self.interval if beats == self._beats else 0.0), self._beats
            if age > self._timeout:
                host = os.environ.get("MASTER_ADDR", "rank 0's host")
                what = f"rank {self._rank} has not reached {host} for {self._timeout:g} s in step {self._where()}"
                kind = "error" if _first_here() else "stopped"
                end_with(2, f"{kind}: {what}; {END}")


def lives(beat: bytes | None) -> bool | None:
    """Whether the process that sent this heartbeat still exists; None on another host, where it cannot be looked up."""
    last = json.loads(beat) if beat else {}
    return born(last["pid"]) == last["born"] if local(last) else None


def _kill_if_here(beat: bytes | None) -> None:
    """Kill a process of this host that hung for too long; torchrun would wait another 30 s."""
    if beat and lives(beat):
        with suppress(OSError):
            os.kill(json.loads(beat)["pid"], signal.SIGKILL)


def _first_here() -> bool:
    """Return True for the first rank of this job on this host that calls it; used when ranks cannot communicate."""
    name = f"\0gdd_dist-{os.environ.get('MASTER_ADDR')}-{os.environ.get('MASTER_PORT')}"
    try:
        _claim.bind(name)
    except OSError:
        return False
    return True  # the socket name is free again after this process ends


_claim = socket.socket(socket.AF_UNIX)


def describe(rank: int, beat: bytes | None) -> str:
    """Return rank, process, host and step, as known from its last heartbeat."""
    if beat is None:
        return f"rank {rank}, which never joined,"
    last = json.loads(beat)
    return f"rank {rank} (process {last['pid']} on {last['host']}, in step {last['step']})"
