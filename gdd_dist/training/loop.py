"""The training loop of every step that trains: resume, read ahead, vote, checkpoint, skip, log.

A step supplies a `Trainee`: its state, how a batch is read, and one training step. Benchmarks and tests observe loops through
`watchers`, without replacing functions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

from torch import Tensor

from gdd_dist.data.workers import prefetch
from gdd_dist.runtime.groups import Ranks
from gdd_dist.runtime.monitor import Monitor, due
from gdd_dist.runtime.signals import Preempted
from gdd_dist.storage.checkpoints import Checkpoints
from gdd_dist.training.context import Context
from gdd_dist.training.skipped_steps import Skips, going_back_once

T = TypeVar("T", bound="Trainee")


class Trainee(ABC):
    """What a loop trains. ``name``: shown to the user; ``steps``: total number; ``skips``: its skipped steps."""

    name: str
    steps: int
    skips: Skips
    monitor: Monitor

    @abstractmethod
    def begin(self, start: int) -> None:
        """Begin after ``start`` steps: open ``monitor``, and announce to the loader which images will be read."""

    @abstractmethod
    def read(self, step: int) -> Any:
        """Return this rank's share of a step's batch, with its random draws. A pure function, called ahead in another thread."""

    @abstractmethod
    def train(self, step: int, batch: Any) -> dict[str, Tensor]:
        """Make one training step; returns scalars. Raises Diverged after too many skipped steps in a row."""

    @abstractmethod
    def log(self, step: int, scalars: dict[str, float]) -> None:
        """Log the scalars of a step, which are means over ranks."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return all state needed to resume, complete on the rank that writes. All ranks call it."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the result of ``state_dict``."""

    def before_step(self, step: int) -> None:  # noqa: B027
        """Called before each step, and with ``steps`` after the last one, for measurements. It may raise Preempted."""

    @abstractmethod
    def after_step(self, done: int) -> None:
        """Called after ``done`` steps, for progress, pictures and snapshots."""

    @abstractmethod
    def close(self) -> None:
        """Free objects that keep the process group alive."""


class Watcher:
    """Observes every loop of this process, for benchmarks and tests; add an instance to ``watchers``."""

    def batches(self, trainee: Trainee, start: int, batches: Iterator[Any]) -> Iterator[Any]:
        """Return the iterator that the loop will use in place of ``batches``."""
        return batches

    def before_step(self, trainee: Trainee, step: int) -> None:
        """Called before each training step."""

    def after_step(self, trainee: Trainee, step: int) -> None:
        """Called after each training step, before anything is logged or saved."""


watchers: list[Watcher] = []


def train(ctx: Context, make: Callable[[], T], ranks: Ranks, checkpoints: Checkpoints, name: str, remedy: str) -> T:
    """Train what ``make`` builds to its end, from the newest checkpoint; if it diverges, once more from the last checkpoint.

    Raises UserError with the ``remedy`` if it diverges again, Preempted if the job must stop and its progress is saved.
    """

    def attempt(draw: int) -> T:
        trainee = make()
        _fit(ctx, trainee, ranks, checkpoints, draw)
        return trainee

    return going_back_once(name, attempt, remedy, ranks.say)


def _fit(ctx: Context, trainee: Trainee, ranks: Ranks, checkpoints: Checkpoints, draw: int) -> None:
    """Train in one attempt; ``draw`` selects the noise."""
    start = 0
    if (found := checkpoints.load()) is not None:
        start, state = found
        trainee.load_state_dict(state)
        ctx.resumed = True
    trainee.skips.draw = max(trainee.skips.draw, draw)
    trainee.begin(start)

    def save(done: int) -> None:
        state = trainee.state_dict()
        if ranks.is_main:
            trainee.monitor.flush()
            checkpoints.save(done, state)

    batches = prefetch(trainee.read, start, trainee.steps, ctx.config.loader.prefetch)
    for watcher in watchers:
        batches = watcher.batches(trainee, start, batches)
    for step, batch in enumerate(batches, start):
        _before(trainee, step, save)
        vote = ranks.vote(checkpoints.due() and step + 1 < trainee.steps)
        _step(trainee, ranks, step, batch)
        vote.obey(partial(save, step + 1), sound=lambda: not trainee.skips.in_a_row)
    trainee.skips.settle()
    ranks.say(trainee.skips.line(trainee.name, trainee.steps))
    _before(trainee, trainee.steps, save)
    ranks.vote().obey(partial(save, trainee.steps))  # handles a signal during the last step


def _step(trainee: Trainee, ranks: Ranks, step: int, batch: Any) -> None:
    for watcher in watchers:
        watcher.before_step(trainee, step)
    scalars = trainee.train(step, batch)
    for watcher in watchers:
        watcher.after_step(trainee, step)
    if due(step, trainee.steps):
        trainee.log(step, ranks.mean(scalars))
    trainee.after_step(step + 1)
    ranks.say(trainee.skips.line(trainee.name, step + 1))


def _before(trainee: Trainee, step: int, save: Callable[[int], None]) -> None:
    """Call ``before_step``; if the job is asked to stop meanwhile, save the present state."""
    try:
        trainee.before_step(step)
    except Preempted:
        save(step)
        raise
