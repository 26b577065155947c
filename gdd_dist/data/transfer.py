"""Copies batches to a GPU: in one copy, in parallel to computation; only the thread that reads ahead waits for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import Tensor

Batch = TypeVar("Batch")
ALIGNED = 16
"""Alignment in bytes of each tensor in the buffer that is copied."""


class Beside:
    """Runs work on its own CUDA stream if ``device`` is a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, work: Callable[[], Tensor]) -> Tensor:
        """Return the result of ``work``, a tensor on the device, after it is complete."""
        if self._stream is None:
            return work()
        with torch.cuda.stream(self._stream):
            found = work()
        self._stream.synchronize()
        # It was allocated on our stream, so its memory must not be reused before the caller's stream has read it.
        found.record_stream(torch.cuda.current_stream(self._device))
        return found


class Sender:
    """Sends batches to ``device``. A batch is a tensor, a tuple of batches (a named one too), or anything else."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._beside = device, Beside(device)

    def __call__(self, batch: Batch) -> Batch:
        """Return the batch with its tensors on the device; those in host memory go in one copy, for which the caller waits."""
        here = [t for t in _tensors(batch) if t.device.type == "cpu"]
        if self._device.type == "cpu" or not here:
            return batch
        buffer = packed(here, pinned=self._device.type == "cuda")
        sent = iter(unpacked(self._beside(lambda: buffer.to(self._device, non_blocking=True)), here))
        moved: Batch = _mapped(batch, lambda t: next(sent) if t.device.type == "cpu" else t)
        return moved


def packed(tensors: Sequence[Tensor], pinned: bool) -> Tensor:
    """Return the bytes of tensors, one after another: uint8, in page-locked memory if ``pinned``."""
    starts = _starts(tensors)
    buffer = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=pinned)
    for tensor, part in zip(tensors, unpacked(buffer, tensors), strict=True):
        part.copy_(tensor)
    return buffer


def unpacked(buffer: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return views with the dtypes and shapes of ``tensors`` into the result of ``packed(tensors)``, on any device."""
    return [
        buffer[start : start + t.nbytes].view(t.dtype).view(t.shape)
        for t, start in zip(tensors, _starts(tensors), strict=False)
    ]


def _starts(tensors: Sequence[Tensor]) -> list[int]:
    """Return the start of each tensor in the buffer, and the end of the last one."""
    return [0, *accumulate(-(-t.nbytes // ALIGNED) * ALIGNED for t in tensors)]


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, tuple):
        for part in batch:
            yield from _tensors(part)


def _mapped(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return ``batch`` with ``change`` applied to each tensor, in the order of ``_tensors``."""
    if isinstance(batch, Tensor):
        return change(batch)
    if not isinstance(batch, tuple):
        return batch
    parts = [_mapped(part, change) for part in batch]
    return type(batch)(*parts) if hasattr(batch, "_fields") else tuple(parts)
