"""What a user sees while a step works: TensorBoard, a progress bar on a terminal, plain log lines otherwise, the time left. Rank 0 only."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from sharding.progress import duration
from sharding.redact import redact

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

EVERY_STEP_UNTIL = 20
LINE_SECONDS = 10.0
FIRST_LOOK = 10.0
"""Seconds of work before the first estimate of a run's remaining time."""


def say(text: str) -> None:
    """Print one line for the user on stderr, without disturbing a progress bar."""
    tqdm.write(redact(text), file=sys.stderr)
    sys.stderr.flush()


@contextmanager
def naming(path: Path | None) -> Iterator[None]:
    """Add ``path`` to an OSError that is raised inside and names no file."""
    try:
        yield
    except OSError as e:
        e.filename = e.filename or (None if path is None else str(path))
        raise


def due(step: int, total: int) -> bool:
    """Whether scalars of ``step`` are to be logged: each of the first 20, then every 20th and the last."""
    return step < EVERY_STEP_UNTIL or step % 20 == 0 or step == total - 1


def write_text(directory: Path, name: str, text: str) -> None:
    """Show ``text`` unchanged in TensorBoard; it replaces what an earlier run wrote into ``directory``."""
    with naming(directory), _writer(directory, 0) as writer:
        writer.add_text(name, "".join(f"    {line}\n" for line in text.splitlines()), 0)


def _writer(directory: Path, start: int) -> SummaryWriter:
    """Return TensorBoard's writer. It is imported here, because most programs draw no curves."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(directory), purge_step=start)


class Monitor:
    """Scalars, pictures and progress of one step, from ``start`` (steps done) to ``total``. Silent on ranks other than 0.

    ``directory`` is this step's own (None: no TensorBoard): after a resume, points of ``start`` and later that an
    interrupted run wrote are purged. ``passing``: of a part of a step; at its end its bar disappears, and no line is printed.
    ``whole``: returns as text how long the whole run still takes, for the seconds left of this loop; empty: unknown.
    """

    def __init__(
        self,
        directory: Path | None,
        step: str,
        total: int,
        *,
        start: int = 0,
        unit: str = "step",
        active: bool = True,
        passing: bool = False,
        whole: Callable[[float], str] = lambda loop: "",
    ) -> None:
        self.step, self.total, self.unit, self._active, self._passing = step, total, unit, active, passing
        self._whole = whole
        self._begin = self._line = time.monotonic()
        self._start, self._done = start, start
        self._writer: SummaryWriter | None = None
        self._directory = directory
        self._bar: tqdm[Any] | None = None
        if active:
            if directory is not None:
                with naming(directory):
                    self._writer = _writer(directory, start)
            if sys.stderr.isatty():
                options: dict[str, Any] = {"unit": unit, "dynamic_ncols": True, "leave": not passing}
                self._bar = tqdm(total=total, initial=start, desc=step, **options)

    def already(self, done: int) -> None:
        """Note that an earlier run did the units up to ``done``, which do not count in the rate."""
        self._start += done - self._done
        if self._bar is not None:
            self._bar.initial += done - self._done
            self._bar.n = self._bar.last_print_n = done
            self._bar.refresh()
        self._done = done

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Log ``values`` as STEP/NAME."""
        if self._writer:
            from gdd_dist.runtime.tensorboard_layout import scalar

            with naming(self._directory):
                for name, value in values.items():
                    self._writer._get_file_writer().add_summary(scalar(f"{self.step}/{name}", value), step)

    def hparams(self, settings: Mapping[str, Any], results: Mapping[str, float]) -> None:
        """Log the run's settings (flat) and results for TensorBoard's HPARAMS page."""
        if self._writer:
            from gdd_dist.runtime.tensorboard_layout import hparams

            own = {f"result/{name}": value for name, value in results.items()}
            with naming(self._directory):
                for summary in hparams(settings, {f"{self.step}/{name}": value for name, value in own.items()}):
                    self._writer._get_file_writer().add_summary(summary)
            self.scalars(0, own)

    def histogram(self, name: str, values: np.ndarray, step: int) -> None:
        """Log a histogram of the finite ``values`` as STEP/NAME, and print the number of the others."""
        if self._writer:
            finite = values[np.isfinite(values)]
            if finite.size < values.size:
                say(f"{self.step}: {values.size - finite.size} of {values.size} {name} are not finite at step {step}")
            if finite.size:  # TensorBoard refuses an empty one
                self._writer.add_histogram(f"{self.step}/{name}", finite, step)

    def picture(self, name: str, image: np.ndarray, step: int) -> None:
        """Log a uint8 picture [H, W, 3] as STEP/NAME."""
        if self._writer:
            self._writer.add_image(f"{self.step}/{name}", image, step, dataformats="HWC")

    def advance(self, done: int, note: str = "", images: int = 0) -> None:
        """Show that ``done`` of ``total`` are done. ``note``: a few figures; ``images`` per unit: logs images per second to TensorBoard."""
        if not self._active:
            return
        now = time.monotonic()
        rate = (done - self._start) / max(now - self._begin, 1e-9)
        if images and due(done - 1, self.total):
            self.scalars(done - 1, {"images_per_second": images * rate})
        left = (self.total - done) / rate if rate > 0 else 0.0
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(filter(None, (note, self._whole(left)))), refresh=False)
            self._bar.update(done - self._done)
        ended = done == self.total and done > self._done and not self._passing
        self._done = done
        if self._bar is None and (now - self._line > LINE_SECONDS or ended):
            self._line = now
            speed = f"{rate:{'.1f' if rate >= 1 else '.2g'}} {self.unit}s/s"
            text = f"{self.step}: {done:,} of {self.total:,} {self.unit}s, {speed}"
            here = f"{duration(left)} left" if left else ""
            say(", ".join(filter(None, (text, here, note, self._whole(left)))))

    def flush(self) -> None:
        """Write all points out. Called before a checkpoint, so that a resume from it leaves no gap in the curves."""
        if self._writer:
            with naming(self._directory):
                self._writer.flush()

    def close(self) -> None:
        """Flush and end."""
        if self._bar is not None:
            self._bar.close()
        if self._writer:
            with naming(self._directory):
                self._writer.close()


class Outlook:
    """Estimates the remaining time of a whole run: its remaining images, at the average speed so far.

    ``images``: how many images each unfinished step forwards over all ranks, in the order of steps; ``done``: images that this
    step has forwarded so far; ``clock``: seconds. An image takes longer in some steps than in others, so early estimates can be
    wrong by a factor of two. They improve during the run.
    """

    def __init__(
        self, images: Mapping[str, int], done: Callable[[], int], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._left, self._done, self._clock = dict(images), done, clock
        self._step, self._seconds, self._images, self._begin = "", 0.0, 0, 0.0

    def begin(self, step: str) -> None:
        """Begin to count ``step``, unless it is finished."""
        self._step, self._begin = step, self._clock()

    def end(self, step: str) -> None:
        """Record that ``step`` is finished. If it forwarded images, they and its time count in the speed."""
        if images := self._done():
            self._images += images
            self._seconds += self._clock() - self._begin
        self._left.pop(step, None)

    def seconds(self, loop: float = 0.0) -> float | None:
        """Return the seconds until the run ends; None if there is no estimate yet. ``loop``: seconds that this step takes at least."""
        done, spent = self._done(), self._seconds + self._clock() - self._begin
        images = self._images + done
        if spent < FIRST_LOOK or not images:
            return None
        here = max(self._left.get(self._step, 0) - done, 0)
        later = sum(n for step, n in self._left.items() if step != self._step)
        return max(here * spent / images, loop) + later * spent / images

    def __call__(self, loop: float = 0.0) -> str:
        """Return the text for progress lines; empty if there is no estimate yet, or nothing is left. ``loop``: as of `seconds`."""
        seconds = self.seconds(loop)
        return "" if not seconds else f"whole run: about {duration(seconds)} left"
