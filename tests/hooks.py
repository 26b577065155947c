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

from gdd_dist import gan, grading, logits, matching, monitor, teachers
from gdd_dist.adversarial import Adversaries
from gdd_dist.checkpoint import Checkpoints
from gdd_dist.context import Context
from gdd_dist.models.classifiers import Classifier
from gdd_dist.models.discriminator import Discriminator
from gdd_dist.models.generator import Generator


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
    """From now on gan and matching log the scalars of each step. All ranks need it."""
    for module in (gan, matching):
        module.due = lambda *_args: True


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


def count_forwards(rank: int, step: str, folder: Path) -> None:
    """Write to FOLDER/forwards-RANK how many images each optimizer step of ``gan`` or ``matching`` forwards, one a line."""
    module: Any = {"gan": gan, "matching": matching}[step]
    inner = module.train_step

    def train_step(ctx: Context, *args: Any) -> Any:
        before = ctx.forwards
        result = inner(ctx, *args)
        with (folder / f"forwards-{rank}").open("a") as f:
            f.write(f"{ctx.forwards - before}\n")
        return result

    module.train_step = train_step


def die_in_teachers(rank: int, marker: Path, step: int) -> None:
    """SIGKILL one rank in the middle of its training, once the other training has come as far."""
    inner, train_one = teachers.train_step, teachers.train_one
    checkpoints, calls = [Path()], [0]

    def remember(ctx: Context, training: Any, work: Path, *args: Any) -> Any:
        checkpoints[0], calls[0] = work / "checkpoints", 0
        return train_one(ctx, training, work, *args)

    def train_step(*args: Any) -> Any:
        if calls[0] == step:
            _until(lambda: _trainings_at(checkpoints[0], step) == 2)
            _die_once(marker)
        calls[0] += 1
        return inner(*args)

    teachers.train_step, teachers.train_one = train_step, remember


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
    inner = grading.save_record

    def save_record(path: Path, *args: Any) -> None:
        if len(list(path.parent.glob("*.json"))) >= students:
            _die_once(marker)
        inner(path, *args)

    grading.save_record = save_record


def _die_once(marker: Path, before: Callable[[], None] = lambda: None) -> None:
    with suppress(FileExistsError):
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
        before()
        os.kill(os.getpid(), signal.SIGKILL)


def die_in_gan(rank: int, victim: int, step: int) -> None:
    """SIGKILL when ``step`` steps of the gan are done."""
    _before_step(gan, 2, step, rank == victim, lambda: os.kill(os.getpid(), signal.SIGKILL))


def die_in_matching(rank: int, victim: int, step: int) -> None:
    """SIGKILL when ``step`` steps of matching are done."""
    _before_step(matching, 3, step, rank == victim, lambda: os.kill(os.getpid(), signal.SIGKILL))


def hold_in_gan(rank: int, until: Path) -> None:
    """Stay in the middle of the gan until a file is there."""
    _before_step(gan, 2, 5, rank == 0, lambda: _until(until.exists))


def _before_step(module: Any, place: int, step: int, wanted: bool, action: Callable[[], None]) -> None:
    """Call ``action`` before ``module.train_step`` of this step, its argument number ``place``."""
    inner = module.train_step

    def train_step(*args: Any) -> Any:
        if args[place] == step:
            action()
        return inner(*args)

    if wanted:
        module.train_step = train_step


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
    """Send this rank a signal as it calls gdd_dist.MODULE.FUNCTION (``where``) for the ``call``-th time, counted from 0."""
    if victim in (None, rank):
        before_call(where, call, lambda: os.kill(os.getpid(), number))


def busy_in(rank: int, where: str, call: int, seconds: float, victim: int) -> None:
    """This rank is busy for a while, in Python, as it calls gdd_dist.MODULE.FUNCTION for the ``call``-th time."""

    def work() -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            sum(range(1000))

    if rank == victim:
        before_call(where, call, work)


def before_each_call(where: str, action: Callable[[], None]) -> None:
    """Do something before each call of gdd_dist.MODULE.FUNCTION."""
    name, function = where.split(".")
    module = importlib.import_module(f"gdd_dist.{name}")
    inner = getattr(module, function)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        action()
        return inner(*args, **kwargs)

    setattr(module, function, wrapped)


def before_call(where: str, call: int, action: Callable[[], None]) -> None:
    """Do something before the ``call``-th call of gdd_dist.MODULE.FUNCTION, counted from 0."""
    calls = [0]

    def count() -> None:
        if calls[0] == call:
            action()
        calls[0] += 1

    before_each_call(where, count)


def spoil(rank: int, where: str, calls: range, victim: int) -> None:
    """Make what ``adversarial.losses`` gives (``where``: its function) not finite on one rank, at these calls."""
    from gdd_dist import adversarial

    inner, count = getattr(adversarial.losses, where), [0]

    def spoilt(*args: Any) -> Any:
        count[0] += 1
        return inner(*args) + float("nan") if count[0] - 1 in calls else inner(*args)

    if rank == victim:
        setattr(adversarial.losses, where, spoilt)


def call_in(rank: int, where: str, call: int, action: Callable[[], None], victim: int = 0) -> None:
    """Do something once, on one rank, as it calls gdd_dist.MODULE.FUNCTION for the ``call``-th time, counted from 0."""
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
