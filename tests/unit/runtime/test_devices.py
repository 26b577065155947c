"""Which device a rank gets; torch is told of GPUs that are not there."""

import ctypes
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from gdd_dist.runtime.devices import backend, check_identities, choose_kernels, identity, pick_device
from sharding.errors import UserError


@pytest.fixture
def gpus(monkeypatch):
    """Makes torch see so many GPUs."""

    def see(count):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", lambda _index: None)
        uuid = "1234"
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: SimpleNamespace(uuid=uuid))

    return see


def test_a_gpu_for_each_rank(gpus):
    gpus(4)
    assert [pick_device("auto", r, 4) for r in range(4)] == [torch.device("cuda", r) for r in range(4)]
    assert pick_device("cpu", 3, 4) == torch.device("cpu")


def test_the_only_gpu_that_a_rank_sees_is_its_own(gpus):
    gpus(1)
    assert [pick_device("cuda", r, 4) for r in range(4)] == [torch.device("cuda", 0)] * 4


def test_without_gpus_there_is_the_cpu(gpus):
    gpus(0)
    assert pick_device("auto", 7, 8) == torch.device("cpu")
    assert identity(torch.device("cpu")) == []


@pytest.mark.parametrize(("count", "fits"), [(2, 2), (3, 3), (4, 4), (7, 7)])
def test_fewer_gpus_than_ranks_says_what_to_type(gpus, count, fits):
    gpus(count)
    said = f"8 ranks on this host but {count} CUDA devices; start torchrun --nproc_per_node={fits} (make train RANKS={fits})"
    with pytest.raises(UserError, match=re.escape(said)):
        pick_device("auto", count, 8)


def test_ranks_that_share_the_only_gpu_of_a_host_are_refused(gpus):
    gpus(1)
    same = [identity(pick_device("auto", r, 2)) for r in range(2)]
    with pytest.raises(
        UserError, match=re.escape("2 ranks on this host but 1 CUDA device; start torchrun --nproc_per_node=1 ")
    ):
        check_identities(same, 2)


def test_gpus_of_their_own_on_one_host_or_several_pass():
    check_identities([["a", "1"], ["a", "2"], ["b", "1"], ["b", "2"]], 2)
    check_identities([[], [], []], 3)


def test_what_lies_on_a_gpu_goes_by_nccl_and_what_lies_in_memory_by_gloo():
    assert backend(torch.device("cpu")) == "gloo"
    assert backend(torch.device("cuda", 3)) == "cpu:gloo,cuda:nccl"


def test_kernels_are_the_fastest_or_those_that_add_in_the_same_order(monkeypatch):
    for name in ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    choose_kernels(True)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.benchmark
    assert (os.environ["CUBLAS_WORKSPACE_CONFIG"], os.environ["NCCL_ALGO"]) == (":4096:8", "Ring")
    choose_kernels(False)
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.benchmark


def test_what_the_user_says_of_the_kernels_stays(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    monkeypatch.setenv("NCCL_ALGO", "Tree")
    choose_kernels(True)
    choose_kernels(False)
    assert (os.environ["CUBLAS_WORKSPACE_CONFIG"], os.environ["NCCL_ALGO"]) == (":16:8", "Tree")


FAULTS = """
import resource
import torch
from gdd_dist.runtime.world import World

World("cpu")

def step():
    kept = [torch.ones(3_000_000) for _ in range(4)]  # 12 MB each

for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
@pytest.mark.parametrize(("own", "kept"), [({}, True), ({"MALLOC_TRIM_THRESHOLD_": "131072"}, False)])
def test_a_step_gets_the_memory_that_the_last_one_freed_unless_the_user_has_said_otherwise(own, kept):
    others = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], env={**others, **own}, capture_output=True, text=True, check=True
    )
    pages = 10 * 4 * 12_000_000 // os.sysconf("SC_PAGE_SIZE")
    assert (int(done.stdout) < pages / 20) == kept
