"""What a step costs, from real steps on random weights: seconds, and the peak memory of this rank.

All ranks measure at once, so that they share cores and links as in the run. A batch that would take too long here, or more
memory than there is, is measured at two smaller sizes and continued along the line through them. On a CPU, whose allocator and
kernels blur the memory of small batches, that line is the one of the tensors, which is exact.
"""

from __future__ import annotations

import bisect
import gc
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass, replace

import torch

from gdd_dist.runtime.memory import file_pages, free_memory, peak_memory, reset_peak, tensors_of
from gdd_dist.runtime.world import World

LIMIT_SECONDS = 1.0
"""A step that would take longer is measured with a smaller batch."""
REPEAT_SECONDS = 0.2
"""Short steps are repeated for about this long."""
FIRST_BATCH, GROWTH = 2, 32
CPU_BLUR = 1.5
"""Bytes that a step takes on a CPU for one of tensors (scratch of kernels, gaps in the heap); 1.0 to 2.2 were seen."""

Prepare = Callable[[int], Callable[[], object]]
"""Batch → a step of that many images, to be called several times."""


@dataclass(frozen=True)
class Cost:
    """Of one step, or of several: seconds, and the peak in bytes of what the process (CPU) or its device (CUDA) allocated.

    ``held``: networks and optimizers; ``tensors``: what a step makes beside them, at its peak. A GPU would hold both.
    """

    seconds: float
    memory: float
    tensors: float = 0.0
    held: float = 0.0

    @property
    def on_gpu(self) -> float:
        """Bytes that a GPU would hold."""
        return self.held + self.tensors

    def beside(self, other: Cost) -> Cost:
        """The same, where what ``other`` holds stays in memory."""
        return replace(self, memory=self.memory + other.held, held=self.held + other.held)

    @staticmethod
    def peak(costs: Iterable[Cost], seconds: float) -> Cost:
        """The highest memory of several, and ``seconds``."""
        found = [NOTHING, *costs]
        largest = max(found, key=lambda c: c.on_gpu)
        return Cost(seconds, max(c.memory for c in found), largest.tensors, largest.held)


NOTHING = Cost(0.0, 0.0)


class Curve:
    """Costs by batch, from those measured: (batch, cost), ascending. ``blur``: bytes that the process takes for a byte of tensors."""

    def __init__(self, points: Sequence[tuple[int, Cost]], blur: float = 1.0) -> None:
        self._points, self._blur = points, blur

    def at(self, batch: float) -> Cost:
        """As measured, or on the line through the two nearest batches.

        Beyond the largest batch that line never falls, and an image takes between half and all of the seconds it took there. Such
        short measurements are disturbed by other processes, so the line's slope alone cannot be trusted.
        """
        batches = [b for b, _ in self._points]
        if len(self._points) == 1 or batch <= batches[0]:
            return self._points[0][1]
        upper = min(bisect.bisect_left(batches, batch), len(batches) - 1)
        (a, low), (b, high) = self._points[upper - 1], self._points[upper]
        seconds, memory, tensors = (getattr(high, n) - getattr(low, n) for n in ("seconds", "memory", "tensors"))
        if batch > b:
            an_image = high.seconds / b
            seconds = min(max(seconds, 0.5 * an_image * (b - a)), an_image * (b - a))
            tensors = max(0.0, tensors)
            memory = self._blur * tensors
        more, slopes = (batch - b) / (b - a), (seconds, memory, tensors, 0.0)
        return Cost(*(value + more * slope for value, slope in zip(astuple(high), slopes, strict=True)))


class Meter:
    """Measures steps. ``base``: memory before any network; ``files``: pages of files beside it."""

    def __init__(self, world: World) -> None:
        self._world, self._device = world, world.device
        reset_peak(self._device)
        self.base, self.files = peak_memory(self._device), file_pages(self._device)
        self._blur = 1.0 if self._device.type == "cuda" else CPU_BLUR
        self.extrapolated = False
        """Whether any figure stems from smaller batches."""

    def __call__(self, prepare: Prepare, batch: int, unit: int = 1) -> Curve:
        """The cost of one step of up to ``batch`` images of this rank; smaller batches are multiples of ``unit``. All ranks call it."""
        gc.collect()  # networks of earlier measurements; too slow to do before each
        size, points = min(batch, max(unit, FIRST_BATCH)), list[tuple[int, Cost]]()
        while size:
            points.append((size, self._measure(prepare(size), size == batch)))
            size = self._following(points, batch, unit)
        self.extrapolated |= points[-1][0] < batch
        return Curve(points, self._blur)

    def _following(self, points: list[tuple[int, Cost]], batch: int, unit: int) -> int:
        """The next batch to measure, 0 for none (rank 0 says)."""
        size, last = points[-1]
        if size == batch:
            return 0
        if len(points) == 1:
            most = int(size * LIMIT_SECONDS / max(last.seconds, 1e-9))
        else:
            one_more = Curve(points, self._blur).at(size + 1)
            in_time = (LIMIT_SECONDS - last.seconds) / max(one_more.seconds - last.seconds, 1e-9)
            cuda = self._device.type == "cuda"
            room = torch.cuda.mem_get_info(self._device)[0] if cuda else free_memory() / self._world.local_size
            in_memory = room / 2 / max(one_more.memory - last.memory, 1.0)
            most = size + int(min(in_time, in_memory))
        most = min(most, batch, GROWTH * size)
        if most < batch:
            most = most // unit * unit
            if len(points) == 1:
                most = max(most, min(2 * size, batch))
        return int(self._world.broadcast(most if most == batch or most >= 2 * size else 0))

    def _measure(self, step: Callable[[], object], last: bool) -> Cost:
        """The first step sets up what lasts (optimizer state, kernels); the second is timed, and more where it is short."""
        reset_peak(self._device)
        held = max(0.0, peak_memory(self._device) - self.base)  # an earlier heap may have room for it
        step()
        seconds = self._timed(step, 1)
        again = self._world.broadcast(min(20, int(REPEAT_SECONDS / max(seconds, 1e-9))))
        if last and again:
            seconds = self._timed(step, again)
        memory = peak_memory(self._device)
        tensors = memory - held if self._device.type == "cuda" else tensors_of(step)
        return Cost(*(max(self._world.gather(value)) for value in (seconds, memory, tensors, held)))

    def _timed(self, step: Callable[[], object], times: int) -> float:
        begin = time.perf_counter()
        for _ in range(times):
            step()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return (time.perf_counter() - begin) / times
