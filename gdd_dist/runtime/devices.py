"""Which device a rank computes on: one GPU for each rank of a host, or the CPU."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from sharding.errors import UserError


def pick_device(device: str, local_rank: int, local_size: int) -> torch.device:
    """The device of a rank for ``--device``: auto, cpu or cuda. Raises UserError when its host has no GPU for it.

    A launcher may show each rank a single GPU of its own (srun --gpus-per-task=1): then that is the rank's, whatever its number.
    """
    if device != "cuda" and not (device == "auto" and torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("--device cuda, but torch sees no CUDA device; use --device cpu or mend the driver")
    count = torch.cuda.device_count()
    index = 0 if count == 1 else local_rank
    if index >= count:
        raise UserError(too_few(local_size, count))
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def backend(device: torch.device) -> str:
    """Who carries collectives: NCCL what lies on a GPU, gloo what lies in memory, as votes and words do."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def identity(device: torch.device) -> list[str]:
    """What tells a GPU from all others of the job, [] for the CPU: two ranks must not have the same."""
    if device.type == "cpu":
        return []
    return [os.uname().nodename, str(torch.cuda.get_device_properties(device).uuid)]


def check_identities(identities: Sequence[list[str]], local_size: int) -> None:
    """``identities`` of all ranks. Raises UserError where ranks share a GPU: NCCL would fail with a long message."""
    gpus = {tuple(i) for i in identities if i}
    if len(gpus) < sum(bool(i) for i in identities):
        hosts = {host for host, _ in gpus}
        raise UserError(too_few(local_size, min(sum(h == host for h, _ in gpus) for host in hosts)))


def allow_tf32(allowed: bool) -> None:
    """Whether float32 products and convolutions on a GPU may round what they multiply to TF32, 10 bits of mantissa."""
    # torch's older switches: the newer ones (fp32_precision) make those raise, and libraries still read them.
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed


def choose_kernels(deterministic: bool) -> None:
    """Either those that add in the same order in each run, or those that prove fastest for each shape. Before the first product.

    Deterministic ones make torch raise where it has none.
    """
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        os.environ.setdefault("NCCL_ALGO", "Ring")
    if torch.are_deterministic_algorithms_enabled() != deterministic:  # the call alone loads the compiler
        torch.use_deterministic_algorithms(deterministic)
        # Filling new memory is a search for faults, which costs time.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def too_few(ranks: int, gpus: int) -> str:
    """What is wrong when a host has fewer GPUs than ranks, and what to type."""
    return (
        f"{ranks} ranks on this host but {gpus} CUDA device{'' if gpus == 1 else 's'}; "
        f"start torchrun --nproc_per_node={gpus} (make train RANKS={gpus}), or give --device cpu"
    )
