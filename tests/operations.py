"""Counts what a training step asks of its device, on torch's meta device, which computes nothing. Holds no test."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

META = torch.device("meta")
FUSED = (torch.ops.aten._fused_adam_, torch.ops.aten._fused_sgd_)
REFUSED = {
    "_adaptive_avg_pool2d_backward",
    "adaptive_max_pool2d_backward",
    "upsample_bilinear2d_backward",
    "upsample_bicubic2d_backward",
    "reflection_pad2d_backward",
    "grid_sampler_2d_backward",
    "nll_loss2d_forward",
    "max_unpool2d",
    "bincount",
    "histc",
    "median",
    "put_",
    "scatter_reduce",
}
"""Operations that torch has no deterministic kernel for on a GPU, or has one only sometimes, by `torch.use_deterministic_algorithms`."""


class Counted(TorchDispatchMode):
    """Inside, counts by the name of the operation. A number that the host reads back is an error: the meta device has none. So is an
    operation that --deterministic refuses.

    ``operations``: those that a device would run, views left out; ``copies``: those of them that take something from memory, each
    of which would stop the host until the device has come so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # A fused optimizer changes what it is given and returns nothing; it has no kernel for this device.
        result = None if func.overloadpacket in FUSED else func(*args, **kwargs)
        on_device, in_memory = (any(where) for where in zip(*_places((args, kwargs), result), strict=True))
        if on_device and not _is_view(func):
            self.operations[str(func)] += 1
            assert func.overloadpacket.__name__ not in REFUSED, f"--deterministic refuses {func}"
            if in_memory:
                self.copies[str(func)] += 1
        return result


def _places(*trees: Any) -> Iterator[tuple[bool, bool]]:
    """Of each tensor, whether it lies on the device, and whether in memory; of scalars neither."""
    yield False, False
    for leaf in tree_leaves(trees):
        if isinstance(leaf, Tensor):
            yield leaf.device == META, leaf.device.type == "cpu"


def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
