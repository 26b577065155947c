"""--compile on a GPU: a training step becomes a CUDA graph, so that the host starts all of its kernels with one call."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Step = Callable[..., Tensor]
"""A function of tensors that returns a tensor. It never waits for the device, and changes only lasting tensors, such as weights."""
WARM = 3
"""Ordinary calls for a shape before the capture: they choose and compile the kernels, which must not happen during a capture."""


class Captured:
    """A step that is recorded for each shape of its inputs, after WARM calls, and then replayed with the same kernels.

    The next call for the same shape overwrites the result. Python numbers that the step uses are recorded with it, and do not change.
    """

    def __init__(self, step: Step) -> None:
        self._step, self._stream = step, torch.cuda.Stream()
        self._calls = Counter[Any]()
        self._recorded: dict[Any, tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]] = {}

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Return the step's result for these inputs, tensors on the device."""
        shapes = tuple((x.shape, x.dtype) for x in inputs)
        self._calls[shapes] += 1
        if self._calls[shapes] <= WARM:
            return self._ordinary(inputs)
        if shapes not in self._recorded:
            self._recorded[shapes] = self._record(inputs)
        graph, held, result = self._recorded[shapes]
        torch._foreach_copy_(held, inputs)
        graph.replay()
        return result

    def _ordinary(self, inputs: Sequence[Tensor]) -> Tensor:
        """Run the step on the recording stream, as torch requires, so that everything a stream sets up once is there before the capture."""
        here = torch.cuda.current_stream()
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            result = self._step(*inputs)
        here.wait_stream(self._stream)
        return result

    def _record(self, inputs: Sequence[Tensor]) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]:
        """Return the graph, its input tensors, and its result. Nothing is computed yet."""
        graph, held = torch.cuda.CUDAGraph(), [x.clone() for x in inputs]
        # Threads that read ahead continue during the capture, and their use of the device must not end it.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            result = self._step(*held)
        return graph, held, result
