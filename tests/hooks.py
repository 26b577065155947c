"""What tests do inside a rank before it runs: count its forwards, make it wait, kill it at a known place. Holds no test.

Each hook is called with its rank, in the rank's own process, through functools.partial where it needs more.
"""

from __future__ import annotations

import copy
import importlib
import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from gdd_dist.evaluation import student_results
from gdd_dist.models.classifiers import Classifier
from gdd_dist.models.discriminator import Discriminator
from gdd_dist.models.generator import Generator
from gdd_dist.runtime import monitor
from gdd_dist.steps import logits
from gdd_dist.storage.checkpoints import Checkpoints
from gdd_dist.training import loop
from gdd_dist.training.adversaries import Adversaries
from gdd_dist.training.context import Context


def environment(rank: int, values: dict[str, str]) -> None:
    """Set environment variables."""
    os.environ.update(values)


def talkative(rank: int) -> None:
    """From now on progress is said at every step, not every ten seconds."""
    monitor.LINE_SECONDS = -1.0


def all_of(rank: int, hooks: Sequence[Callable[[int], None]]) -> None:
    """Several hooks, in turn."""
    for hook in hooks:
        hook(rank)


def log_every_step(rank: int) -> None:
    """From now on the loops log the scalars of each step. All ranks need it."""
    monitor.EVERY_STEP_UNTIL = 10**9


def nothing(rank: int) -> None:
    """All is as it is."""


def no_test_data(rank: int) -> None:
    """From now on the test split may not be opened."""
    inner = Context.images

    def images(self: Context, split: str) -> Any:
        assert split != "test", "the test split was opened"
        return inner(self, split)

    Context.images = images


def no_forward(rank: int) -> None:
    """From now on no network answers."""

    def forward(*_args: Any) -> Any:
        raise AssertionError("a network was asked")

    for network in (Classifier, Generator, Discriminator):
        network.forward = forward


class At(loop.Watcher):
    """Calls ``action(trainee, step)`` before each training step of the loops whose name begins with ``name``."""

    def __init__(self, name: str, action: Callable[[Any, int], None]) -> None:
        self._name, self._action = name, action

    def before_step(self, trainee: Any, step: int) -> None:
        if trainee.name.startswith(self._name):
            self._action(trainee, step)


class Forwards(loop.Watcher):
    """Writes to a file how many images each step of one loop forwards, one a line."""

    def __init__(self, name: str, path: Path) -> None:
        self._name, self._path, self._before = name, path, 0

    def before_step(self, trainee: Any, step: int) -> None:
        self._before = trainee._ctx.forwards

    def after_step(self, trainee: Any, step: int) -> None:
        if trainee.name == self._name:
            with self._path.open("a") as f:
                f.write(f"{trainee._ctx.forwards - self._before}\n")


def count_forwards(rank: int, step: str, folder: Path) -> None:
    """Write to FOLDER/forwards-RANK how many images each optimizer step of ``gan`` or ``matching`` forwards, one a line."""
    loop.watchers.append(Forwards(step, folder / f"forwards-{rank}"))


def die_in_teachers(rank: int, marker: Path, step: int) -> None:
    """SIGKILL one rank in the middle of its training, once the other training has come as far."""

    def die(pupil: Any, at: int) -> None:
        if at == step:
            _until(lambda: _trainings_at(pupil._work / "checkpoints", step) == 2)
            _die_once(marker)

    loop.watchers.append(At("teachers", die))


def _trainings_at(checkpoints: Path, step: int) -> int:
    """How many trainings have a checkpoint of ``step`` or later, or are done."""
    done = {p.stem for p in checkpoints.glob("training-*.json")}
    newest: dict[str, int] = {}
    for path in checkpoints.glob("training-*/step-*.json"):
        newest[path.parent.name] = max(newest.get(path.parent.name, 0), int(path.stem[5:]))
    return sum(name in done or at >= step for name, at in newest.items())


def die_in_logits(rank: int, marker: Path, files: int) -> None:
    """SIGKILL one rank once so many files of the cache are there."""
    inner = logits._write

    def write(path: Path, values: Any) -> bytes:
        if len(list(path.parent.parent.glob("teacher-*/*.npy"))) >= files:
            _die_once(marker)
        return inner(path, values)

    logits._write = write


def die_in_report(rank: int, marker: Path, students: int) -> None:
    """SIGKILL one rank once so many students are trained."""
    inner = student_results.save_record

    def save_record(path: Path, *args: Any) -> None:
        if len(list(path.parent.glob("*.json"))) >= students:
            _die_once(marker)
        inner(path, *args)

    student_results.save_record = save_record


def _die_once(marker: Path, before: Callable[[], None] = lambda: None) -> None:
    with suppress(FileExistsError):
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
        before()
        os.kill(os.getpid(), signal.SIGKILL)


def die_in_gan(rank: int, victim: int, step: int) -> None:
    """SIGKILL when ``step`` steps of the gan are done."""
    _before_step("gan", step, rank == victim, lambda: os.kill(os.getpid(), signal.SIGKILL))


def die_in_matching(rank: int, victim: int, step: int) -> None:
    """SIGKILL when ``step`` steps of matching are done."""
    _before_step("matching", step, rank == victim, lambda: os.kill(os.getpid(), signal.SIGKILL))


def hold_in_gan(rank: int, until: Path) -> None:
    """Stay in the middle of the gan until a file is there."""
    _before_step("gan", 5, rank == 0, lambda: _until(until.exists))


def _before_step(name: str, step: int, wanted: bool, action: Callable[[], None]) -> None:
    """Call ``action`` before this step of a loop."""
    if wanted:
        loop.watchers.append(At(name, lambda _trainee, at: action() if at == step else None))


def _until(condition: Callable[[], bool], timeout: float = 120.0) -> None:
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("what the hook waited for never came")
        time.sleep(0.005)


PARTS = ("generator", "discriminator", "generator's moments", "discriminator's moments", "ema", "step")


def forget(rank: int, part: str) -> None:
    """Checkpoints come back without one part of the state: it is as a run that begins would have it."""
    if part == "step":
        load = Checkpoints.load
        Checkpoints.load = lambda self: (lambda found: (found[0] - 1, found[1]))(load(self))
        return
    inner = Adversaries.load_state_dict

    def load_state_dict(self: Adversaries, state: dict[str, Any]) -> None:
        fresh = copy.deepcopy(self.state_dict())
        if part == "ema":
            state["ema"] = fresh["ema"]
        else:
            kind = "optimizer" if part.endswith("moments") else "module"
            state[part[0]] = {**state[part[0]], kind: fresh[part[0]][kind]}
        inner(self, state)

    Adversaries.load_state_dict = load_state_dict


def signal_in(rank: int, where: str, call: int, number: int, victim: int | None = None) -> None:
    """Send this rank a signal as it comes to ``where`` (see `before_each_call`) for the ``call``-th time, counted from 0."""
    if victim in (None, rank):
        before_call(where, call, lambda: os.kill(os.getpid(), number))


def busy_in(rank: int, where: str, call: int, seconds: float, victim: int) -> None:
    """This rank is busy for a while, in Python, as it comes to ``where`` (see `before_each_call`) for the ``call``-th time."""

    def work() -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            sum(range(1000))

    if rank == victim:
        before_call(where, call, work)


def before_each_call(where: str, action: Callable[[], None]) -> None:
    """Do something before each step of the loop ``where`` (gan, matching, teachers), or each call of gdd_dist.ROOM.MODULE.FUNCTION."""
    if "." not in where:
        loop.watchers.append(At(where, lambda *_: action()))
        return
    name, _, function = where.rpartition(".")
    module = importlib.import_module(f"gdd_dist.{name}")
    inner = getattr(module, function)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        action()
        return inner(*args, **kwargs)

    setattr(module, function, wrapped)


def before_call(where: str, call: int, action: Callable[[], None]) -> None:
    """Do something as ``where`` is come to for the ``call``-th time, counted from 0."""
    calls = [0]

    def count() -> None:
        if calls[0] == call:
            action()
        calls[0] += 1

    before_each_call(where, count)


def spoil(rank: int, where: str, calls: range, victim: int) -> None:
    """Make what ``adversaries.losses`` gives (``where``: its function) not finite on one rank, at these calls."""
    from gdd_dist.training import adversaries

    inner, count = getattr(adversaries.losses, where), [0]

    def spoilt(*args: Any) -> Any:
        count[0] += 1
        return inner(*args) + float("nan") if count[0] - 1 in calls else inner(*args)

    if rank == victim:
        setattr(adversaries.losses, where, spoilt)


def call_in(rank: int, where: str, call: int, action: Callable[[], None], victim: int = 0) -> None:
    """Do something once, on one rank, as it comes to ``where`` (see `before_each_call`) for the ``call``-th time, counted from 0."""
    if rank == victim:
        before_call(where, call, action)


def fail_writes(number: int) -> None:
    """From now on no file of this process reaches the disk: flushing it fails with this errno, and names no file."""

    def fsync(_descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    os.fsync = fsync


def fail_last_file(rank: int, marker: Path, files: int, number: int) -> None:
    """The disk fails rank 1 (see `fail_writes`) at its first file of the cache, when the others have written so many and wait."""
    inner = logits._write

    def write(path: Path, values: Any) -> bytes:
        if rank == 1:
            marker.touch()  # one of the files is its own
            _until(lambda: len(list(path.parent.parent.glob("teacher-*/*.npy"))) == files)
            fail_writes(number)
        _until(marker.exists)
        return inner(path, values)

    logits._write = write


def limit_files(size: int) -> None:
    """From now on no file of this process may grow beyond so many bytes, as by ``ulimit -f``."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def fill_disk(folder: Path) -> None:
    """Write FOLDER/filler until the disk is full."""
    with suppress(OSError), (folder / "filler").open("wb", buffering=0) as stream:
        while True:
            stream.write(b"x" * 4096)


def unmount(folder: Path) -> None:
    """Take a disk away that is in use."""
    subprocess.run(["umount", "-l", str(folder)], check=True)
