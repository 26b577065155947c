"""Signs of life: a rank that is busy for hours is there, one that is stopped or lost is missed after ``timeout`` seconds.

Each rank has a thread that says at short intervals that the rank lives, and at which step it is. Rank 0 watches all ranks,
the others watch rank 0. A rank counts the seconds of silence itself, and only while it is running: clocks of two hosts are
never compared, and when a whole job was suspended no rank is missed. The same thread passes on that the job is to stop.
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
"""Seconds that the main thread has to leave by itself when another rank has failed."""


END = "see what stopped it, then run the same command again: it goes on from the last checkpoint"


class Watch:
    """How long each of ``ranks`` has given no sign; ``step`` is the longest time that one look may add."""

    def __init__(self, ranks: Iterable[int], step: float) -> None:
        self._seen: dict[int, bytes | None] = dict.fromkeys(ranks)
        self._ages = dict.fromkeys(self._seen, 0.0)
        self._step = step

    def look(self, beats: Mapping[int, bytes | None], passed: float) -> dict[int, float]:
        """``beats`` as they stand now (None: never yet) and the seconds since the last look → age of each rank in seconds."""
        for rank, last in self._seen.items():
            same = beats.get(rank) == last
            self._ages[rank] = self._ages[rank] + min(passed, self._step) if same else 0.0
            self._seen[rank] = beats.get(rank)
        return dict(self._ages)


class Pulse:
    """Gives this rank's signs of life and watches those of others. ``where``: the step that this rank is at.

    ``claim``: whether this rank may report a fault. It is asked through the connection of this thread, because the main thread
    may be waiting in its own.
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
        """This rank reports a fault itself: its signs go on, but it acts on nobody's silence."""
        self._quiet.set()

    def close(self) -> None:
        """This rank leaves in good order."""
        self._quiet.set()
        self._stop.set()

    def beat(self, store: Any) -> None:
        """Give a sign of life now, through this connection."""
        store.set(f"beat/{self._rank}", json.dumps({**me(), "n": self._beats + 1, "step": self._where()}))
        self._beats += 1

    def read(self, ranks: Iterable[int]) -> dict[int, bytes | None]:
        """The last sign of each rank, None of one that never gave any."""
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
        """Tell the others that the job is to stop, or hear it from them."""
        number = asked.number  # read once: a signal that comes while the store is asked is passed on by the next call
        if number and not told:
            self._store.set("stop", str(number))
        elif not number and self._store.check(["stop"]):
            asked.note(int(self._store.get("stop")))
        return bool(number)

    def _miss(self, rank: int, beat: bytes | None) -> None:
        what = f"error: {describe(rank, beat)} has given no sign of life for {self._timeout:g} s; {END}"
        mine = self._claim(self._store)
        _kill_if_here(beat)
        end_with(2, what if mine else f"stopped: rank {self._rank}, because another rank failed")

    def _guard(self) -> None:
        """Leave when the store itself no longer answers: its host is gone without a word, or cut off."""
        age, beats = 0.0, -1
        while not self._stop.wait(self.interval):
            age, beats = (age + self.interval if beats == self._beats else 0.0), self._beats
            if age > self._timeout:
                host = os.environ.get("MASTER_ADDR", "rank 0's host")
                what = f"rank {self._rank} has not reached {host} for {self._timeout:g} s in step {self._where()}"
                kind = "error" if _first_here() else "stopped"
                end_with(2, f"{kind}: {what}; {END}")


def lives(beat: bytes | None) -> bool | None:
    """Whether the process that gave this sign of life is there; None where it can not be looked up: on another host."""
    last = json.loads(beat) if beat else {}
    return born(last["pid"]) == last["born"] if local(last) else None


def _kill_if_here(beat: bytes | None) -> None:
    """End a process of this host that has stood still for too long: torchrun would wait 30 s before it does."""
    if beat and lives(beat):
        with suppress(OSError):
            os.kill(json.loads(beat)["pid"], signal.SIGKILL)


def _first_here() -> bool:
    """True for the first rank of this job on this host that asks: for when the ranks cannot ask each other."""
    name = f"\0gdd_dist-{os.environ.get('MASTER_ADDR')}-{os.environ.get('MASTER_PORT')}"
    try:
        _claim.bind(name)
    except OSError:
        return False
    return True  # the name is free again when this process has left


_claim = socket.socket(socket.AF_UNIX)


def describe(rank: int, beat: bytes | None) -> str:
    """Rank, process, host and step, as far as its last sign of life says."""
    if beat is None:
        return f"rank {rank}, which never came,"
    last = json.loads(beat)
    return f"rank {rank} (process {last['pid']} on {last['host']}, in step {last['step']})"
