"""Process groups: their network interface, and means over their ranks."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


@contextmanager
def on_loopback(wanted: bool) -> Iterator[None]:
    """If all ranks are on this host, listen only on loopback, unless the user has chosen an interface."""
    name = "GLOO_SOCKET_IFNAME"
    up = False
    with suppress(OSError, ValueError):
        up = bool(int(Path("/sys/class/net/lo/flags").read_text(), 16) & 1)
    if not wanted or name in os.environ or not up:
        yield
        return
    os.environ[name] = "lo"
    try:
        yield
    finally:
        del os.environ[name]


def mean_over_ranks(values: Mapping[str, torch.Tensor], size: int, group: Any = None) -> dict[str, float]:
    """Return the means of scalar tensors over the ``size`` ranks of ``group`` (None: all ranks). All of them call it."""
    stacked = torch.stack([v.detach().float() for v in values.values()])
    if size > 1:
        dist.all_reduce(stacked, group=group)
        stacked /= size
    return dict(zip(values, stacked.tolist(), strict=True))
