"""Starts searches for tests and looks at what they leave. Holds no test."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
REUSED = ("shards", "teachers", "logits", "gaussian", "gan")
"""What trials share, whatever their settings and seed of matching."""


class Running:
    """A search in a process of its own, whose output goes to files. ``prefix``: what starts it, on another host say."""

    def __init__(
        self, out: Path, argv: Sequence[str], env: dict[str, str] | None = None, prefix: Sequence[str] = ()
    ) -> None:
        out.parent.mkdir(parents=True, exist_ok=True)
        self.out, self._files = (
            out,
            [out.parent / f"{out.name}-{time.monotonic_ns()}-{name}" for name in ("out", "err")],
        )
        with self._files[0].open("w") as stdout, self._files[1].open("w") as stderr:
            self.process = subprocess.Popen(
                [*prefix, sys.executable, str(ROOT / "tune" / "search.py"), "--out", str(out), *argv],
                stdout=stdout, stderr=stderr, env={**os.environ, **(env or {})}, start_new_session=True,
            )  # fmt: skip

    def text(self) -> str:
        """All it has said."""
        return "\n".join(f.read_text() for f in self._files)

    def until(self, condition: Callable[[], bool], timeout: float = 900) -> None:
        """Wait for a condition while the search runs."""
        end = time.monotonic() + timeout
        while not condition():
            if self.process.poll() is not None or time.monotonic() > end:
                self.stop()
                pytest.fail(f"what the test waited for never came\n{self.text()}")
            time.sleep(0.02)

    def wait(self, timeout: float = 900) -> int:
        """Its exit status."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.stop()
            pytest.fail(f"the search hangs\n{self.text()}")

    def stop(self) -> None:
        """Kill it; its Ray ends with it."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()


def search(out: Path, argv: Sequence[str], env: dict[str, str] | None = None, prefix: Sequence[str] = ()) -> Running:
    """Run to a good end."""
    running = Running(out, argv, env, prefix)
    assert running.wait() == 0, running.text()
    assert "error:" not in running.text()
    assert "Traceback" not in running.text()
    return running


def refused(out: Path, argv: Sequence[str], env: dict[str, str] | None = None, prefix: Sequence[str] = ()) -> str:
    """Run to a fault that the user can mend; its one line."""
    running = Running(out, argv, env, prefix)
    assert running.wait() == 2, running.text()
    assert "Traceback" not in running.text()
    errors = [line for line in running.text().splitlines() if line.startswith("error:")]
    assert len(errors) == 1, running.text()
    return errors[0]


def outcomes(out: Path) -> dict[str, dict[str, Any]]:
    """trials.jsonl by id; fails where a trial stands in it twice."""
    path = out / "trials.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    assert len({line["id"] for line in lines}) == len(lines), f"a trial ended twice: {lines}"
    return {line["id"]: line for line in lines}


def progress(out: Path, trial: str) -> list[dict[str, Any]]:
    """What a trial has reported so far."""
    path = out / "trials" / trial / "progress.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []


def steps(out: Path, trial: str) -> dict[str, dict[str, Any]]:
    """A trial's steps.json."""
    found: dict[str, dict[str, Any]] = json.loads((out / "trials" / trial / "steps.json").read_text())["steps"]
    return found


def open_trials(out: Path, reports: int = 1) -> list[str]:
    """Trials that have reported at least so often and have not ended."""
    ended = outcomes(out)
    names = [p.name for p in sorted((out / "trials").glob("*"))]
    return [name for name in names if name not in ended and len(progress(out, name)) >= reports]


def nodes_of(out: Path, trial: str) -> list[str]:
    """Nodes that a trial has reported from, in the order it came to them."""
    hosts = [line["host"].partition("#")[2] for line in progress(out, trial) if "host" in line]
    return list(dict.fromkeys(hosts))


def assert_shared(out: Path) -> None:
    """Every trial reused shards, teachers, logits and GAN, which were computed once, by nobody but the shared job."""
    trials = [p.parent.name for p in (out / "trials").glob("*/steps.json")]  # who is refused at once has none
    assert trials
    for trial in trials:
        found = steps(out, trial)
        assert [found[s]["status"] for s in REUSED] == ["reused"] * len(REUSED)
        assert [found[s]["images_processed"] for s in REUSED] == [0] * len(REUSED)
    for step in REUSED[1:]:
        assert len([p for p in (out / step).iterdir() if p.is_dir() and not p.is_symlink()]) == 1


def family(pid: int) -> set[int]:
    """A process and all that descend from it."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] not in "ZX":
            parents[int(stat.parent.name)] = int(fields[1])
    found = {pid}
    while new := {p for p, parent in parents.items() if parent in found} - found:
        found |= new
    return found & parents.keys()


def listening(pids: set[int]) -> set[str]:
    """Addresses (hexadecimal, as /proc/net/tcp writes them) on which any of these processes listens."""
    inodes = set()
    for pid in pids:
        for fd in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                name = os.readlink(fd)
            except OSError:
                continue
            if name.startswith("socket:["):
                inodes.add(name[8:-1])
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                found.add(fields[1].partition(":")[0])
    return found


def gone(pids: set[int], timeout: float = 240) -> set[int]:
    """Those of these processes that are still there after a while."""
    end = time.monotonic() + timeout
    while (left := {p for p in pids if _lives(p)}) and time.monotonic() < end:
        time.sleep(0.1)
    return left


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
