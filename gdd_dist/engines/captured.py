"""--compile on a GPU: a training step that becomes a CUDA graph. The host then starts all of its kernels with one call."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Step = Callable[..., Tensor]
"""Tensors → a tensor. It asks the host for nothing, and changes only what outlives it, such as weights and their momentum."""
WARM = 3
"""Calls for a shape that run as they are: they choose the kernels and compile them, which must not happen in a capture."""


class Captured:
    """A step that is recorded for each shape of its inputs, after WARM calls, and replayed from then on: the same kernels.

    What a call gives is overwritten by the next call for the same shape. Numbers that the step takes from Python are recorded too.
    """

    def __init__(self, step: Step) -> None:
        self._step, self._stream = step, torch.cuda.Stream()
        self._calls = Counter[Any]()
        self._recorded: dict[Any, tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]] = {}

    def __call__(self, *inputs: Tensor) -> Tensor:
        """What the step gives for these inputs, tensors on the device."""
        shapes = tuple((x.shape, x.dtype) for x in inputs)
        self._calls[shapes] += 1
        if self._calls[shapes] <= WARM:
            return self._as_it_is(inputs)
        if shapes not in self._recorded:
            self._recorded[shapes] = self._record(inputs)
        graph, held, result = self._recorded[shapes]
        torch._foreach_copy_(held, inputs)
        graph.replay()
        return result

    def _as_it_is(self, inputs: Sequence[Tensor]) -> Tensor:
        """On the stream that will record, as torch asks for: what a stream is given at its first call is then there."""
        here = torch.cuda.current_stream()
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            result = self._step(*inputs)
        here.wait_stream(self._stream)
        return result

    def _record(self, inputs: Sequence[Tensor]) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]:
        """The graph, the tensors that it reads, and the one that it gives. Nothing is computed yet."""
        graph, held = torch.cuda.CUDAGraph(), [x.clone() for x in inputs]
        # Threads that read ahead go on meanwhile: what they ask of the device is no fault of this stream.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            result = self._step(*held)
        return graph, held, result
