"""Lock files that name their holder and have a heartbeat: they work without flock, and a dead holder's lock is taken over."""

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
"""Age in seconds from which a temporary file is treated as abandoned."""
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
_UNREADABLE = {"host": "an unknown host", "pid": "?", "born": None, "since": "an unknown time", "id": "unreadable"}


class Lock:
    """A lock with one holder at a time, which touches the file every few seconds.

    A lock whose holder is dead is taken over. A holder on this host is dead when its process does not exist; one on another host
    when the file was not touched for a minute, by the clock of the file system. If several processes want to take it over, the
    one that creates the marker named after the dead holder's id does. A holder that finds its lock taken over, for example
    after its host was suspended, exits at once, because two jobs must not write into one directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._id = uuid.uuid4().hex
        self._stop = threading.Event()
        self._touched: float | None = None
        self.moved = False
        """Whether the file's time was seen to change, so that the holder is alive."""

    def try_acquire(self) -> dict[str, Any] | None:
        """Return None if acquired, else the holder {host, pid, since, id, local}; local: its process can be looked up here."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".tmp-{self._id}")
        temporary.write_text(json.dumps({**me(), "since": time.strftime("%Y-%m-%d %H:%M:%S"), "id": self._id}))
        now = temporary.stat().st_mtime  # by the clock of the file system
        try:
            while not self._create(self.path, temporary):
                holder = self._read(self.path)
                if holder is None:  # it was released just now
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
        """Return the living holder {host, pid, since, id}, or None. Writes nothing, so ages are measured by this host's clock."""
        holder = self._read(self.path)
        return None if holder is None or self._dead(self.path, holder, time.time()) else holder

    @staticmethod
    def _create(path: Path, temporary: Path) -> bool:
        """Make ``path`` a link to the content of ``temporary``, unless it exists."""
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
                marker.unlink(missing_ok=True)  # its owner died while taking over
            return False
        try:
            if self._read(self.path) != holder:
                return False
            os.replace(temporary, self.path)
        finally:
            marker.unlink(missing_ok=True)
        return True

    def _sweep_markers(self, now: float) -> None:
        """Remove the markers of processes that died just after they took over."""
        for marker in self.path.parent.glob(f"{self.path.name}.*.dead"):
            taker = self._read(marker)
            if taker is not None and self._dead(marker, taker, now):
                marker.unlink(missing_ok=True)

    def release(self) -> None:
        """Release the lock."""
        self._stop.set()
        _held.discard(self)
        holder = self._read(self.path)
        if holder and holder["id"] == self._id:
            self.path.unlink(missing_ok=True)

    @staticmethod
    def _read(path: Path) -> dict[str, Any] | None:
        """Return the holder, or None. A lock file emptied by a crash of its host has an unknown holder, judged only by its age."""
        try:
            text = path.read_text(errors="replace")
        except FileNotFoundError:
            return None
        try:
            return {**_UNREADABLE, **json.loads(text)}
        except (ValueError, TypeError):
            return dict(_UNREADABLE)

    def _dead(self, path: Path, holder: Mapping[str, Any], now: float) -> bool:
        """Whether the holder of ``path`` is dead."""
        if local(holder):
            return born(holder["pid"]) != holder["born"]
        try:
            with path.open("rb") as stream:  # opening makes a network file system refresh the time
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
                    who = f"process {holder['pid']} on {holder['host']} while this process was suspended"
                    end_with(2, f"error: {self.path} was taken over by {who}; let that process continue")
                os.utime(self.path)


_held: set[Lock] = set()


def _release_all() -> None:
    for lock in list(_held):
        lock.release()


at_end(_release_all)


def _sweep(directory: Path, now: float) -> None:
    """Remove old temporary files of killed processes; newer ones may belong to another job."""
    for path in (*directory.glob(".tmp-*"), *directory.glob(".*.tmp")):
        with suppress(OSError):
            if now - path.lstat().st_mtime > LEFT_BEHIND:
                path.unlink()


@contextmanager
def holding(lock: Lock, busy: Callable[[Mapping[str, Any]], None]) -> Iterator[None]:
    """Hold ``lock``. While another process holds it, ``busy(holder)`` is called, which raises, or returns to keep waiting."""
    while (holder := lock.try_acquire()) is not None:
        busy(holder)
        time.sleep(0.5)
    try:
        yield
    finally:
        lock.release()


def in_use(out: Path, holder: Mapping[str, Any]) -> UserError:
    """Return the error for a run directory that another job holds."""
    who = f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    return UserError(f"{out} is in use by {who}; wait for it, or choose another --out")
