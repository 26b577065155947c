"""How far a phase of a build is: a bar on a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable
from types import TracebackType

from tqdm import tqdm

Log = Callable[[str], None]
INTERVAL_S = 10.0


class Progress:
    """Counts images of one phase. Use as a context manager; `update` takes the number done so far."""

    def __init__(self, label: str, total: int, *, log: Log, bar: bool) -> None:
        self._label, self._total, self._log = label, total, log
        self._bar = tqdm(total=total, desc=label, unit=" images", unit_scale=False) if bar else None
        self._done, self._start = 0, time.monotonic()
        self._last = self._start

    def update(self, done: int) -> None:
        """Show that `done` images are done."""
        if self._bar is not None:
            self._bar.update(done - self._done)
        elif time.monotonic() - self._last >= INTERVAL_S:
            self._last = time.monotonic()
            self._log(f"{self._label}: {done:,} of {self._total:,} images, {self._rate(done):,.0f} images/s")
        self._done = done

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()
        elif kind is None:
            self._log(f"{self._label}: {self._done:,} images, {self._rate(self._done):,.0f} images/s")

    def _rate(self, done: int) -> float:
        return done / max(time.monotonic() - self._start, 1e-9)
