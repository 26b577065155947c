"""Starts ranks for tests, cheaply: forks of a server that has imported torch once. Holds no test.

Each rank runs `gdd_dist.train` as torchrun would start it, in a process of its own with its own stdout and stderr. What only
torchrun does (restart, its own report, signals to the other ranks) is tested with torchrun itself.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from gdd_dist.config.steps import TABLE

Before = Callable[[int], None]
"""Called with its rank in each process before anything else: counts, holds or kills."""

STEPS = [f"gdd_dist.steps.{name}" for name in TABLE]
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["gdd_dist.train", "gdd_dist.pipeline.run", *STEPS, "torch._dynamo", "pytest"])


@dataclass(frozen=True)
class Ended:
    """A job that is over. ``codes``: exit status by rank, negative for a signal."""

    codes: list[int]
    out: list[str]
    err: list[str]

    @property
    def errors(self) -> list[str]:
        """All `error:` lines of all ranks."""
        return [line for text in (*self.out, *self.err) for line in text.splitlines() if line.startswith("error:")]

    @property
    def text(self) -> str:
        """Everything, for a failing test's message."""
        return "\n".join(f"--- rank {r}: {c}\n{e}" for r, (c, e) in enumerate(zip(self.codes, self.err, strict=True)))


class Job:
    """Ranks that were started and may be running."""

    def __init__(self, processes: list[BaseProcess], folder: Path) -> None:
        self.processes, self._folder = processes, folder

    @property
    def running(self) -> bool:
        """Whether any rank is."""
        return any(p.exitcode is None for p in self.processes)

    def err(self, rank: int = 0) -> str:
        """What a rank has written to stderr so far."""
        path = self._folder / f"err-{rank}"
        return path.read_text() if path.exists() else ""

    def send(self, number: int, rank: int | None = None) -> None:
        """Send a signal to one rank, or to all that are there."""
        for r, process in enumerate(self.processes):
            if rank in (None, r) and process.exitcode is None and process.pid:
                with suppress(ProcessLookupError):  # it ended just now
                    os.kill(process.pid, number)

    def until(self, condition: Callable[[], bool], timeout: float = 240) -> None:
        """Wait for a condition while the job runs."""
        end = time.monotonic() + timeout
        while not condition():
            if not self.running or time.monotonic() > end:
                self.send(signal.SIGKILL)
                pytest.fail(f"what the test waited for never came\n{self.wait().text}")
            time.sleep(0.01)

    def wait(self, timeout: float = 240) -> Ended:
        """Wait for all ranks; a job that hangs fails the test."""
        end = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        hung = [r for r, p in enumerate(self.processes) if p.exitcode is None]
        self.send(signal.SIGKILL)
        for process in self.processes:
            process.join()
        out, err = (
            [(self._folder / f"{name}-{r}").read_text() for r in range(len(self.processes))] for name in ("out", "err")
        )
        ended = Ended([p.exitcode or 0 for p in self.processes], out, err)
        if hung:
            pytest.fail(f"ranks {hung} hang\n{ended.text}")
        return ended

    def wait_as_torchrun(self, timeout: float = 240) -> Ended:
        """As `wait`, but when a rank fails the others get SIGTERM, as torchrun's do."""
        end = time.monotonic() + timeout
        while self.running and time.monotonic() < end:
            if any(p.exitcode for p in self.processes):
                self.send(signal.SIGTERM)
            time.sleep(0.02)
        return self.wait(max(1.0, end - time.monotonic()))


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _rank(function: Callable[..., None], args: tuple[Any, ...], env: dict[str, str], folder: Path) -> None:
    os.environ.update(env)
    for number, name in ((1, "out"), (2, "err")):
        fd = os.open(folder / f"{name}-{env['RANK']}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        os.dup2(fd, number)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    try:
        function(*args)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def launch(folder: Path, size: int, function: Callable[..., None], args: Sequence[Any]) -> Job:
    """Start ``function(rank, *args)`` in ``size`` ranks whose output goes to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    processes = []
    for rank in range(size):
        env = {
            "RANK": rank,
            "WORLD_SIZE": size,
            "LOCAL_RANK": rank,
            # One thread a rank, also where the ranks are fewer than the cores: what is tested is not speed.
            "LOCAL_WORLD_SIZE": max(size, os.cpu_count() or 1),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "TORCHELASTIC_RUN_ID": "test",  # the signal handlers of a rank under torchrun
        }
        text = {k: str(v) for k, v in env.items()}
        process = _server.Process(target=_rank, args=(function, (rank, *args), text, folder), daemon=True)
        process.start()
        processes.append(process)
    return Job(processes, folder)


def _train(rank: int, argv: list[str], before: Before | None) -> None:
    from gdd_dist import train
    from gdd_dist.runtime.run_program import run_program

    if before is not None:
        before(rank)
    run_program(train.main, argv)


_jobs = iter(range(10**6))


def start(out: Path, argv: Sequence[str], size: int = 1, before: Before | None = None, logs: Path | None = None) -> Job:
    """Start `gdd_dist.train --out OUT ARGV` on ``size`` ranks; what they print goes below ``logs``, by default beside OUT."""
    folder = (logs or out.parent) / f"{out.name}-job-{next(_jobs)}"
    return launch(folder, size, _train, (["--out", str(out), *argv], before))


def train(out: Path, argv: Sequence[str], size: int = 1, before: Before | None = None) -> dict[str, Any]:
    """Run to a good end; returns the steps of steps.json (none after --help and the like)."""
    ended = start(out, argv, size, before).wait()
    assert ended.codes == [0] * size, ended.text
    assert not ended.errors, ended.text
    return steps(out)


def refused(
    out: Path, argv: Sequence[str], size: int = 1, before: Before | None = None, logs: Path | None = None
) -> str:
    """Run to a fault that the user can mend: status 2 from the rank that says so, one `error:` line, which is returned."""
    ended = start(out, argv, size, before, logs).wait()
    assert set(ended.codes) == {2}, ended.text
    assert len(ended.errors) == 1, ended.text
    assert "Traceback" not in ended.text
    quiet = [text for text in ended.err if "error:" not in text]
    assert all("stopped:" in text for text in quiet), ended.text
    return ended.errors[0]


def steps(out: Path) -> dict[str, Any]:
    """What steps.json says."""
    path = out / "steps.json"
    found: dict[str, Any] = json.loads(path.read_text())["steps"] if path.exists() else {}
    return found


def _call(rank: int, function: Callable[..., Any], args: tuple[Any, ...], folder: Path) -> None:
    torch.set_num_threads(1)
    torch.save(function(rank, *args), folder / f"result-{rank}.pt")


def call(folder: Path, size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """``function(rank, *args)`` in ``size`` processes that may form a World; returns what each gave."""
    ended = launch(folder, size, _call, (function, args, folder)).wait()
    assert ended.codes == [0] * size, ended.text
    return [torch.load(folder / f"result-{r}.pt", weights_only=True) for r in range(size)]


@contextmanager
def torchrun(size: int, argv: Sequence[str], *, elastic: Sequence[str] = ()) -> Iterator[subprocess.Popen[str]]:
    """A real torchrun of gdd_dist.train, killed at the end if it is still there (its ranks end with it)."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={size}", *elastic]
    process = subprocess.Popen(
        [*command, "-m", "gdd_dist.train", *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def weights(path: Path) -> bytes:
    """A file's numbers: of safetensors all after the header (whose metadata says when it was made), else all of it."""
    data = path.read_bytes()
    if path.suffix != ".safetensors":
        return data
    length = int.from_bytes(data[:8], "little")
    return json.dumps(_layout(data[8 : 8 + length]), sort_keys=True).encode() + data[8 + length :]


def _layout(header: bytes) -> dict[str, Any]:
    return {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
