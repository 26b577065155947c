"""Lock files that name their holder, with a heartbeat: they work where flock does not, and a dead holder does not keep them."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gdd_dist.runtime.process_identity import born, local, me
from gdd_dist.runtime.signals import at_end, end_with
from sharding.errors import UserError

HEARTBEAT = 5.0
DEAD_AFTER = 60.0
LEFT_BEHIND = 3600.0
"""Seconds after which a temporary file belongs to nobody."""
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
_UNREADABLE = {"host": "an unknown host", "pid": "?", "born": None, "since": "an unknown time", "id": "unreadable"}


class Lock:
    """One holder at a time, who touches the file every few seconds.

    A lock whose holder is dead is taken over. A holder of this host is dead when its process is gone; one of another host when the
    file was not touched for a minute, by the clock of the file system. Of several that want to take over, the one that creates
    the marker named after the dead holder's id does. A holder that finds its lock taken over, say after its host was
    suspended, ends at once: two jobs must not write one directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._id = uuid.uuid4().hex
        self._stop = threading.Event()
        self._touched: float | None = None
        self.moved = False
        """Whether the holder's heartbeat was seen to move."""

    def try_acquire(self) -> dict[str, Any] | None:
        """None when acquired, else the holder {host, pid, since, id, local}; local: its process can be looked up here."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".tmp-{self._id}")
        temporary.write_text(json.dumps({**me(), "since": time.strftime("%Y-%m-%d %H:%M:%S"), "id": self._id}))
        now = temporary.stat().st_mtime  # by the clock of the file system
        try:
            while not self._create(self.path, temporary):
                holder = self._read(self.path)
                if holder is None:  # given back just now
                    continue
                if not self._dead(self.path, holder, now) or not self._take_over(temporary, holder, now):
                    return {**holder, "local": local(holder)}
                break
            _sweep(self.path.parent, now)
            self._sweep_markers(now)
        finally:
            temporary.unlink(missing_ok=True)
        threading.Thread(target=self._beat, daemon=True).start()
        _held.add(self)
        return None

    def holder(self) -> dict[str, Any] | None:
        """The living holder {host, pid, since, id}, None if there is none; takes and writes nothing, so this host's clock must do."""
        holder = self._read(self.path)
        return None if holder is None or self._dead(self.path, holder, time.time()) else holder

    @staticmethod
    def _create(path: Path, temporary: Path) -> bool:
        """Make ``path`` hold what ``temporary`` does, unless it exists."""
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError as e:
            if e.errno not in _NO_LINKS:
                raise
            try:
                descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
            except FileExistsError:
                return False
            with os.fdopen(descriptor, "w") as stream:
                stream.write(temporary.read_text())
        return True

    def _take_over(self, temporary: Path, holder: Mapping[str, Any], now: float) -> bool:
        marker = self.path.with_name(f"{self.path.name}.{holder['id'][:16]}.dead")
        if not self._create(marker, temporary):
            taker = self._read(marker)
            if taker is not None and self._dead(marker, taker, now):
                marker.unlink(missing_ok=True)  # it died as it took over
            return False
        try:
            if self._read(self.path) != holder:
                return False
            os.replace(temporary, self.path)
        finally:
            marker.unlink(missing_ok=True)
        return True

    def _sweep_markers(self, now: float) -> None:
        """Remove what takers left who died just after they took over."""
        for marker in self.path.parent.glob(f"{self.path.name}.*.dead"):
            taker = self._read(marker)
            if taker is not None and self._dead(marker, taker, now):
                marker.unlink(missing_ok=True)

    def release(self) -> None:
        """Give the lock back."""
        self._stop.set()
        _held.discard(self)
        holder = self._read(self.path)
        if holder and holder["id"] == self._id:
            self.path.unlink(missing_ok=True)

    @staticmethod
    def _read(path: Path) -> dict[str, Any] | None:
        """Who holds a lock, None if nobody does; of one that a crash of its host left empty, its age alone counts."""
        try:
            text = path.read_text(errors="replace")
        except FileNotFoundError:
            return None
        try:
            return {**_UNREADABLE, **json.loads(text)}
        except (ValueError, TypeError):
            return dict(_UNREADABLE)

    def _dead(self, path: Path, holder: Mapping[str, Any], now: float) -> bool:
        """Whether the holder of ``path`` is gone."""
        if local(holder):
            return born(holder["pid"]) != holder["born"]
        try:
            with path.open("rb") as stream:  # opened, so that a network file system looks again
                touched = os.fstat(stream.fileno()).st_mtime
        except FileNotFoundError:
            return False
        self.moved |= self._touched not in (None, touched)
        self._touched = touched
        return now - touched > DEAD_AFTER

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT):
            with suppress(OSError):
                holder = self._read(self.path)
                if holder and holder["id"] != self._id and not self._stop.is_set():
                    who = f"process {holder['pid']} on {holder['host']} while this process stood still"
                    end_with(2, f"error: {self.path} was taken over by {who}; leave it to that one")
                os.utime(self.path)


_held: set[Lock] = set()


def _release_all() -> None:
    for lock in list(_held):
        lock.release()


at_end(_release_all)


def _sweep(directory: Path, now: float) -> None:
    """Remove temporary files that killed processes left long ago; younger ones may belong to another job."""
    for path in (*directory.glob(".tmp-*"), *directory.glob(".*.tmp")):
        with suppress(OSError):
            if now - path.lstat().st_mtime > LEFT_BEHIND:
                path.unlink()


@contextmanager
def holding(lock: Lock, busy: Callable[[Mapping[str, Any]], None]) -> Iterator[None]:
    """Hold ``lock``; while another holds it, call ``busy(holder)``, which raises or returns to wait on."""
    while (holder := lock.try_acquire()) is not None:
        busy(holder)
        time.sleep(0.5)
    try:
        yield
    finally:
        lock.release()


def in_use(out: Path, holder: Mapping[str, Any]) -> UserError:
    """What to say of a run directory that another job holds."""
    who = f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    return UserError(f"{out} is in use by {who}; wait for it, or choose another --out")
