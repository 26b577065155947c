"""Batches on their way to a GPU: in one copy, beside what the GPU computes, while nobody but the thread that reads ahead waits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import Tensor

Batch = TypeVar("Batch")
ALIGNED = 16
"""Bytes: where a tensor begins in the buffer that is copied."""


class Beside:
    """Works on a stream of its own, where ``device`` is a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, work: Callable[[], Tensor]) -> Tensor:
        """What ``work`` gives, a tensor on the device, when it is done."""
        if self._stream is None:
            return work()
        with torch.cuda.stream(self._stream):
            found = work()
        self._stream.synchronize()
        # It was allocated on our stream: its memory must wait for those who read it on theirs.
        found.record_stream(torch.cuda.current_stream(self._device))
        return found


class Sender:
    """Sends batches to ``device``. A batch is a tensor, a tuple of batches (a named one too), or anything else."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._beside = device, Beside(device)

    def __call__(self, batch: Batch) -> Batch:
        """The same with its tensors on the device: those that lie in memory go in one copy, and who calls waits for it."""
        here = [t for t in _tensors(batch) if t.device.type == "cpu"]
        if self._device.type == "cpu" or not here:
            return batch
        buffer = packed(here, pinned=self._device.type == "cuda")
        sent = iter(unpacked(self._beside(lambda: buffer.to(self._device, non_blocking=True)), here))
        moved: Batch = _mapped(batch, lambda t: next(sent) if t.device.type == "cpu" else t)
        return moved


def packed(tensors: Sequence[Tensor], pinned: bool) -> Tensor:
    """The bytes of tensors in memory, one after another: uint8, in page-locked memory if ``pinned``."""
    starts = _starts(tensors)
    buffer = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=pinned)
    for tensor, part in zip(tensors, unpacked(buffer, tensors), strict=True):
        part.copy_(tensor)
    return buffer


def unpacked(buffer: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Views of what ``packed(tensors)`` made, wherever it lies now: of their dtypes and shapes."""
    return [
        buffer[start : start + t.nbytes].view(t.dtype).view(t.shape)
        for t, start in zip(tensors, _starts(tensors), strict=False)
    ]


def _starts(tensors: Sequence[Tensor]) -> list[int]:
    """Where each begins in the buffer, and where the last one ends."""
    return [0, *accumulate(-(-t.nbytes // ALIGNED) * ALIGNED for t in tensors)]


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, tuple):
        for part in batch:
            yield from _tensors(part)


def _mapped(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """``batch`` with each tensor changed, in the order of ``_tensors``."""
    if isinstance(batch, Tensor):
        return change(batch)
    if not isinstance(batch, tuple):
        return batch
    parts = [_mapped(part, change) for part in batch]
    return type(batch)(*parts) if hasattr(batch, "_fields") else tuple(parts)
