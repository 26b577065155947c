"""Which device a rank computes on: one GPU for each rank of a host, or the CPU."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence

import torch

from sharding.errors import UserError


def pick_device(device: str, local_rank: int, local_size: int) -> torch.device:
    """Return the device of a rank for ``--device``: auto, cpu or cuda. Raises UserError when its host has no GPU for it.

    A launcher may give each rank one visible GPU (srun --gpus-per-task=1); the rank then uses it, whatever its local rank.
    """
    if device != "cuda" and not (device == "auto" and torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("--device cuda, but torch sees no CUDA device; use --device cpu or repair the driver")
    count = torch.cuda.device_count()
    index = 0 if count == 1 else local_rank
    if index >= count:
        raise UserError(too_few(local_size, count))
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def backend(device: torch.device) -> str:
    """Return the backends of collectives: NCCL for tensors on a GPU, gloo for tensors in host memory, such as votes."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def identity(device: torch.device) -> list[str]:
    """Return values that identify a GPU among all GPUs of the job, [] for the CPU: no two ranks may have the same GPU."""
    if device.type == "cpu":
        return []
    return [os.uname().nodename, str(torch.cuda.get_device_properties(device).uuid)]


def check_identities(identities: Sequence[list[str]], local_size: int) -> None:
    """Raise UserError if two of the ``identities`` are equal: ranks share a GPU, for which NCCL's message is long and unclear."""
    gpus = {tuple(i) for i in identities if i}
    if len(gpus) < sum(bool(i) for i in identities):
        hosts = {host for host, _ in gpus}
        raise UserError(too_few(local_size, min(sum(h == host for h, _ in gpus) for host in hosts)))


def allow_tf32(allowed: bool) -> None:
    """Set whether float32 products and convolutions on a GPU may round their factors to TF32, with 10 bits of mantissa."""
    # torch's older switches: once the newer ones (fp32_precision) are set, reading these raises, and libraries still read them.
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed


def choose_kernels(deterministic: bool) -> None:
    """Choose deterministic kernels (torch then refuses operations without one), or the fastest. Call it before the first product."""
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        os.environ.setdefault("NCCL_ALGO", "Ring")
    if torch.are_deterministic_algorithms_enabled() != deterministic:  # any call imports the compiler
        torch.use_deterministic_algorithms(deterministic)
        # Filling new memory only helps to find bugs, and costs time.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def keep_freed_memory() -> None:
    """Let glibc keep the memory that a step frees for the next one, unless the environment has settings of its own for it.

    By default blocks of some megabytes go back to the system, and the next step pays a page fault for each 4 KB of them: a
    sixth to a half of a training step on a CPU (benchmarks/allocator.py). Other C libraries have no such switch.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ):
        return
    m_trim_threshold, m_top_pad, m_mmap_threshold = -1, -2, -3  # malloc.h
    mallopt(m_mmap_threshold, 1 << 30)
    mallopt(m_trim_threshold, (1 << 31) - 1)
    mallopt(m_top_pad, 64 << 20)


def too_few(ranks: int, gpus: int) -> str:
    """Return the error message for a host with fewer GPUs than ranks."""
    return (
        f"{ranks} ranks on this host but {gpus} CUDA device{'' if gpus == 1 else 's'}; "
        f"start torchrun --nproc_per_node={gpus} (make train RANKS={gpus}), or give --device cpu"
    )
