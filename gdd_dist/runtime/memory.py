"""Measures the memory of the host or GPU, of this process, and of the tensors that a function creates."""

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
"""Bytes that a CUDA process needs besides its tensors: context, cuBLAS and cuDNN handles."""


def tensors_of(step: Callable[[], object]) -> int:
    """Return the peak bytes of all tensors that a step creates."""
    with _Tensors() as found:
        step()
    return found.peak


class _Tensors(TorchDispatchMode):
    """Tracks storages from the operation that creates them until they are freed."""

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
    """Return unused memory to the system, and restart the peak at the current use."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # only glibc has it, and keeps freed memory without it
    if trim is not None:
        trim(0)
    with suppress(OSError):  # without this file, the peak is since the start of the process
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """Return peak bytes since ``reset_peak``: allocated by this process, or tensors of the CUDA device and its context.

    Pages of files (libraries, shards) are left out, because the kernel can drop them and read them again.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) + CUDA_CONTEXT
    if peak := _kernel("VmHWM"):
        return peak - _kernel("RssFile")
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def file_pages(device: torch.device) -> int:
    """Return bytes of files in this process's resident set; 0 if unknown, or for a CUDA device."""
    return 0 if device.type == "cuda" else _kernel("RssFile")


def free_memory() -> int:
    """Return bytes of memory available on this host, including the page cache that the kernel can drop."""
    free = _kernel("MemAvailable", "/proc/meminfo")
    return free or os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def all_memory(device: torch.device) -> int:
    """Return total bytes of a GPU, else of this host or container."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return min(host, int(text)) if text.isdigit() else host


def _kernel(name: str, file: str = "/proc/self/status") -> int:
    """Return the bytes of entry ``name`` in a file of the kernel, 0 if it is missing."""
    with suppress(OSError):
        for line in Path(file).read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return 0
