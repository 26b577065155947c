"""What tests do inside a rank before it runs: count its forwards, make it wait, kill it at a known place. Holds no test.

Each hook is called with its rank, in the rank's own process, through functools.partial where it needs more.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from gdd_dist import gan, grading, logits, matching, teachers
from gdd_dist.adversarial import Adversaries
from gdd_dist.artifacts import read_json
from gdd_dist.context import Context
from gdd_dist.models.classifiers import Classifier
from gdd_dist.models.discriminator import Discriminator
from gdd_dist.models.generator import Generator


def environment(rank: int, values: dict[str, str]) -> None:
    """Set environment variables."""
    os.environ.update(values)


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
    lists = checkpoints.glob("training-*/latest.json")
    return sum(p.parent.name in done or read_json(p)["checkpoints"][0]["step"] >= step for p in lists)


def die_in_logits(rank: int, marker: Path, files: int) -> None:
    """SIGKILL one rank once so many files of the cache are there."""
    inner = logits._write

    def write(path: Path, values: Any) -> None:
        if len(list(path.parent.parent.glob("teacher-*/*.npy"))) >= files:
            _die_once(marker)
        inner(path, values)

    logits._write = write


def die_in_report(rank: int, marker: Path, students: int) -> None:
    """SIGKILL one rank once so many students are trained."""
    inner = grading.save_record

    def save_record(path: Path, *args: Any) -> None:
        if len(list(path.parent.glob("*.json"))) >= students:
            _die_once(marker)
        inner(path, *args)

    grading.save_record = save_record


def _die_once(marker: Path) -> None:
    with suppress(FileExistsError):
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
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


def forget_moments(rank: int) -> None:
    """Checkpoints come back without the optimizers' state."""
    inner = Adversaries.load_state_dict

    def load_state_dict(self: Adversaries, state: dict[str, Any]) -> None:
        fresh = self.state_dict()
        for name in ("g", "d"):
            state[name] = {**state[name], "optimizer": fresh[name]["optimizer"]}
        inner(self, state)

    Adversaries.load_state_dict = load_state_dict
