"""What a step leaves behind: a directory named by the fingerprint of all that shaped it, whole or not there at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sharding.errors import UserError
from sharding.files import fsync_dir, remove_temporaries, sha256_file, write_atomic

HEARTBEAT = 5.0
DEAD_AFTER = 60.0
CONTENTS = "contents.json"


def fingerprint(parts: Mapping[str, Any]) -> str:
    """16 hex digits of the SHA-256 of ``parts`` as canonical JSON. Raises TypeError for what JSON cannot hold."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def json_bytes(value: Any) -> bytes:
    """JSON as all files here hold it."""
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all."""
    write_atomic(path, json_bytes(value))


def read_json(path: Path) -> Any:
    """Read JSON; UserError names the file when it is missing or damaged."""
    try:
        return json.loads(path.read_text())
    except OSError as e:
        raise UserError(f"cannot read {path} ({e.strerror}); remove its directory to compute it again") from e
    except ValueError as e:
        raise UserError(f"{path} is damaged (not JSON); remove its directory to compute it again") from e


class Store:
    """STORE/<step>/<fingerprint>/ of every finished step, ``.partial`` beside it while a step works."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, step: str, fp: str) -> Path:
        """Where the finished step lies."""
        return self.root / step / fp

    def partial(self, step: str, fp: str) -> Path:
        """Where the step works."""
        return self.root / step / f"{fp}.partial"

    def finished(self, step: str, fp: str) -> bool:
        """Whether the step is there, whole."""
        return (self.path(step, fp) / CONTENTS).exists()

    def finish(self, step: str, fp: str, info: Mapping[str, Any]) -> Path:
        """Record size and sha256 of every file, drop checkpoints, flush, rename: from now on it is never written again."""
        work = self.partial(step, fp)
        shutil.rmtree(work / "checkpoints", ignore_errors=True)
        for directory in (work, *(d for d in work.rglob("*") if d.is_dir())):
            remove_temporaries(directory)
        files = {
            str(p.relative_to(work)): {"bytes": p.stat().st_size, "sha256": sha256_file(p)}
            for p in sorted(work.rglob("*"))
            if p.is_file()
        }
        files.pop(CONTENTS, None)
        write_json(work / CONTENTS, {"format": "gdd-step/1", "step": step, "fingerprint": fp, **info, "files": files})
        for directory in sorted({p.parent for p in work.rglob("*") if p.is_file()}):
            fsync_dir(directory)
        os.rename(work, self.path(step, fp))
        fsync_dir(self.path(step, fp).parent)
        return self.path(step, fp)

    def files(self, step: str, fp: str) -> list[tuple[Path, int, str]]:
        """(path, bytes, sha256) of every file of a finished step."""
        directory = self.path(step, fp)
        contents = read_json(directory / CONTENTS)
        if contents.get("fingerprint") != fp or contents.get("step") != step:
            raise UserError(f"{directory / CONTENTS} belongs to another step; remove {directory} to compute it again")
        return [(directory / name, f["bytes"], f["sha256"]) for name, f in contents["files"].items()]


def verify_file(path: Path, size: int, sha256: str, remedy: str) -> None:
    """Raise UserError naming ``path`` when it is missing, has another size or another hash."""
    try:
        found = path.stat().st_size
    except OSError:
        raise UserError(f"{path} is missing; {remedy}") from None
    if found != size:
        raise UserError(f"{path} has {found} bytes instead of {size}; {remedy}")
    if sha256_file(path) != sha256:
        raise UserError(f"{path} is damaged (sha256 differs); {remedy}")


def link_latest(out: Path, step: str, target: Path) -> None:
    """OUT/<step>/latest → the finished directory, as a relative link, replaced in one move."""
    directory = out / step
    directory.mkdir(parents=True, exist_ok=True)
    temporary = directory / f".tmp-{uuid.uuid4().hex}"
    temporary.symlink_to(os.path.relpath(target.resolve(), directory.resolve()))
    os.replace(temporary, directory / "latest")


class Lock:
    """A lock file that names its holder; works where flock does not. Its holder touches it every few seconds.

    A lock whose holder is dead (on this host: no such process; elsewhere: no heartbeat for a minute) is taken over, by
    exactly one taker: whoever creates the marker named after the dead holder's id.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._id = uuid.uuid4().hex
        self._stop = threading.Event()

    def try_acquire(self) -> dict[str, Any] | None:
        """None when acquired, else the holder {host, pid, since, id}."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        mine = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "born": _born(os.getpid()),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "id": self._id,
        }
        temporary = self.path.with_name(f".tmp-{self._id}")
        temporary.write_text(json.dumps(mine))
        try:
            while not self._create(temporary):
                holder = self._holder()
                if holder is None:  # given back just now
                    continue
                if self._alive(holder) or not self._take_over(temporary, holder):
                    return holder
                break
        finally:
            temporary.unlink(missing_ok=True)
        threading.Thread(target=self._beat, daemon=True).start()
        return None

    def holder(self) -> dict[str, Any] | None:
        """The living holder {host, pid, since, id}, None if there is none; takes nothing."""
        holder = self._holder()
        return holder if holder is not None and self._alive(holder) else None

    def _create(self, temporary: Path) -> bool:
        try:
            os.link(temporary, self.path)
        except FileExistsError:
            return False
        return True

    def _take_over(self, temporary: Path, holder: Mapping[str, Any]) -> bool:
        marker = self.path.with_name(f"{self.path.name}.{holder['id'][:16]}.dead")
        try:
            os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        try:
            if self._holder() != holder:
                return False
            os.replace(temporary, self.path)
        finally:
            marker.unlink()
        return True

    def release(self) -> None:
        """Give the lock back."""
        self._stop.set()
        holder = self._holder()
        if holder and holder["id"] == self._id:
            self.path.unlink(missing_ok=True)

    def _holder(self) -> dict[str, Any] | None:
        """Who holds the lock, None if nobody does; of a lock that a crash of its host left empty, its age alone counts."""
        try:
            text = self.path.read_text(errors="replace")
        except FileNotFoundError:
            return None
        try:
            holder: dict[str, Any] = json.loads(text)
        except ValueError:
            return {"host": "an unknown host", "pid": "?", "born": None, "since": "an unknown time", "id": "unreadable"}
        return holder

    def _alive(self, holder: Mapping[str, Any]) -> bool:
        if holder["host"] == socket.gethostname() and holder["born"] is not None:
            return _born(holder["pid"]) == holder["born"]
        with suppress(OSError):
            return time.time() - self.path.stat().st_mtime < DEAD_AFTER
        return True

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT):
            with suppress(OSError):
                os.utime(self.path)


def _born(pid: int) -> int | None:
    """When a process began, in clock ticks since boot, so that a reused number is not taken for its former owner.

    None for one that has ended, even if its parent has not looked (in containers the first process often never does).
    """
    with suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[19]) if fields[0] not in "ZX" else None
    return None


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
