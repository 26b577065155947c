"""Progress, speed and remaining time of long work: a bar on a terminal, plain lines of text elsewhere."""

import time
from collections.abc import Callable

from tqdm import tqdm

Log = Callable[[str], None]
INTERVAL_S = 10.0


def duration(seconds: float) -> str:
    """Return a number of seconds as readable text."""
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds else "0"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 360_000 else f"{seconds / 86400:.0f} days"


class Progress:
    """Counts images (or `unit`s) of one phase. Use as a context manager; `update` takes the number done so far."""

    def __init__(self, label: str, total: int, *, log: Log, bar: bool, unit: str = "images") -> None:
        self._label, self._total, self._log, self._unit = label, total, log, unit
        self._bar = tqdm(total=total, desc=label, unit=f" {unit}") if bar else None
        self._done, self._start = 0, time.monotonic()
        self._last = self._start

    def update(self, done: int) -> None:
        """Show that `done` images are done."""
        if self._bar is not None:
            self._bar.update(done - self._done)
        elif time.monotonic() - self._last >= INTERVAL_S:
            self._last = time.monotonic()
            left = f", {duration((self._total - done) / self._rate(done))} left" if done else ""
            self._log(f"{self._label}: {done:,} of {self._total:,} {self._speed(done)}{left}")
        self._done = done

    def more(self, images: int) -> None:
        """Show that `images` more are done."""
        self.update(self._done + images)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        elif kind is None:
            self._log(f"{self._label}: {self._done:,} {self._speed(self._done)}")

    def _speed(self, done: int) -> str:
        return f"{self._unit}, {self._rate(done):,.0f} {self._unit}/s"

    def _rate(self, done: int) -> float:
        return done / max(time.monotonic() - self._start, 1e-9)
