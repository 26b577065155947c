"""--compile: networks whose forward, and its backward, torch turns into fewer and larger kernels."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

Network = TypeVar("Network", bound=nn.Module)
BACKEND = "inductor"
SHAPES = 64
"""Variants of one forward that torch may compile, for architectures, batch sizes, training and evaluation, before it gives up."""


def compiled(net: Network) -> Network:
    """``net`` with its forward compiled when it is first called; what is called around a forward is not. Returns ``net``, changed.

    Not for a network whose gradient is differentiated again: torch compiles no second backward.
    """
    from torch._dynamo import config  # takes as long to load as torch itself

    config.recompile_limit = SHAPES
    net.forward = torch.compile(net.forward, backend=BACKEND)
    return net
