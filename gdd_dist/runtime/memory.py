"""How much memory there is, how much this process or its device takes, and how much the tensors of a piece of code."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA_CONTEXT = 600 * 2**20
"""What a CUDA process takes beside its tensors: context, cuBLAS and cuDNN handles."""


def tensors_of(step: Callable[[], object]) -> int:
    """Bytes of all tensors that a step makes, at their peak."""
    with _Tensors() as found:
        step()
    return found.peak


class _Tensors(TorchDispatchMode):
    """Follows storages from the operation that makes them to their end."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in given and storage._cdata not in self._alive:
                    self._follow(storage)
        return out

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()

        def gone(_reference: object) -> None:
            self._alive.pop(key, None)
            self.now -= size

        self._alive[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def reset_peak(device: torch.device) -> None:
    """Give back what is free, and start the peak from what is left."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone; it keeps freed memory otherwise
    if trim is not None:
        trim(0)
    with suppress(OSError):  # elsewhere the peak is that of the process since its start
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """Bytes at the peak since ``reset_peak``: what this process allocated, or tensors of the CUDA device and its context.

    Pages of files (libraries, shards) are left out: the kernel drops and reads them again as it likes.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) + CUDA_CONTEXT
    if peak := _kernel("VmHWM"):
        return peak - _kernel("RssFile")
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def file_pages(device: torch.device) -> int:
    """Bytes of files in this process's resident set; 0 where unknown, or where memory is a CUDA device's."""
    return 0 if device.type == "cuda" else _kernel("RssFile")


def free_memory() -> int:
    """Bytes of memory that this host can still give, the page cache that it may drop included."""
    free = _kernel("MemAvailable", "/proc/meminfo")
    return free or os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def all_memory(device: torch.device) -> int:
    """Bytes of a GPU, else of this host or of the container it is."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return min(host, int(text)) if text.isdigit() else host


def _kernel(name: str, file: str = "/proc/self/status") -> int:
    """Bytes that the kernel's file says of ``name``, 0 where it says nothing."""
    with suppress(OSError):
        for line in Path(file).read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return 0
