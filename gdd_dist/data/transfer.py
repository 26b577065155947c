"""Copies batches to a GPU: in one copy, in parallel to computation; only the thread that reads ahead waits for it."""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

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
    """Sends batches to ``device``. A batch is a tree of tuples (named ones too) whose leaves are tensors or anything else."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._beside = device, Beside(device)

    def __call__(self, batch: Batch) -> Batch:
        """Return the batch with its tensors on the device; those in host memory go in one copy, for which the caller waits."""
        leaves, form = tree_flatten(batch)
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.device.type == "cpu"]
        if self._device.type == "cpu" or not places:
            return batch
        here = [leaves[i] for i in places]
        buffer = packed(here, pinned=self._device.type == "cuda")
        sent = unpacked(self._beside(lambda: buffer.to(self._device, non_blocking=True)), here)
        for i, tensor in zip(places, sent, strict=True):
            leaves[i] = tensor
        moved: Batch = tree_unflatten(leaves, form)
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
