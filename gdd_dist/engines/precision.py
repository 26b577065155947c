"""The precision of computation; weights stay float32."""

from __future__ import annotations

import contextlib
from typing import Any, TypeVar

import torch
from torch import nn

Network = TypeVar("Network", bound=nn.Module)
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """Return autocast to bf16 or fp16, or a context that does nothing for float32 and tf32."""
    if precision not in AUTOCAST:
        return contextlib.nullcontext()
    return torch.autocast(device.type, AUTOCAST[precision])


def cast_once(net: Network, precision: str) -> Network:
    """Convert convolutions and linear layers of an untrained ``net`` to the dtype of ``precision``. The results under `autocast` are the
    same, but it would convert these weights at each forward. Returns ``net``, changed.
    """
    if precision in AUTOCAST:
        for module in net.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.to(AUTOCAST[precision])
    return net


def resolve_precision(precision: str, device: torch.device) -> str:
    """Resolve ``auto``: bf16 if the hardware supports it, else float32."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() else "float32"
