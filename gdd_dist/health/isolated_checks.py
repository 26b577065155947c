"""Checks that run in their own processes (gloo, compiler, DeepSpeed, Ray), so that they cannot hang or end the doctor."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from importlib import metadata
from pathlib import Path

import torch

from gdd_dist.health.finding import FAIL, OK, WARN, Finding

PATIENCE = 90.0
"""Seconds."""
HUNG = "no response within"


def call(script: str, env: Mapping[str, str] | None = None, seconds: float = PATIENCE) -> str | None:
    """Run Python code in its own process. Returns None on success, else its last line of output, or that it hung."""
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        env={**os.environ, **(env or {})},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        _, said = process.communicate(timeout=seconds)
    except BaseException as e:
        os.killpg(process.pid, signal.SIGKILL)  # also kills its children: a compiler could run for minutes
        process.wait()
        if isinstance(e, subprocess.TimeoutExpired):
            return f"{HUNG} {seconds:.0f} s"
        raise
    lines = [line for line in said.splitlines() if line.strip()]
    return None if process.returncode == 0 else (lines[-1] if lines else f"exit status {process.returncode}")


def remedy(fault: str, fix: str) -> str:
    """Return the advice for a fault; after a timeout, the first advice is to try again later."""
    return f"if the machine is busy, try again later; else {fix}" if HUNG in fault else fix


GLOO = """
import os, torch, torch.distributed as dist
pid = os.fork()
dist.init_process_group("gloo", init_method="tcp://127.0.0.1:{port}", rank=int(pid == 0), world_size=2)
t = torch.ones(1); dist.all_reduce(t); assert t.item() == 2
dist.barrier(); dist.destroy_process_group()
if pid == 0: os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
"""


def backends() -> Finding:
    """Two processes add numbers through gloo; NCCL is only looked for."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        number = s.getsockname()[1]
    nccl = "NCCL is built in" if torch.distributed.is_nccl_available() else "no NCCL"
    fault = call(GLOO.format(port=number))
    if fault:
        fix = "export GLOO_SOCKET_IFNAME=lo (one host) or the network interface between the nodes; make this host's name resolve"
        return Finding("backends", FAIL, f"gloo: {fault}; {nccl}", remedy(fault, fix))
    if torch.cuda.is_available() and not torch.distributed.is_nccl_available():
        return Finding("backends", FAIL, "gloo works; no NCCL", "install the default (CUDA) build of torch")
    return Finding("backends", OK, f"gloo: works between 2 processes; {nccl}")


def compiler() -> Finding:
    """A C++ compiler can build a shared library, and ninja exists: DeepSpeed builds its operations on first use."""
    name = os.environ.get("CXX") or next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), "c++")
    fix = "apt install g++ (or dnf install gcc-c++), or set CXX; only --engine deepspeed needs it"
    if not shutil.which(name):
        return Finding("compiler", WARN, f"no C++ compiler ({name} is not installed)", fix)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "x.cpp"
        source.write_text("#include <vector>\nint answer() { return std::vector<int>{42}[0]; }\n")
        command = [name, "-shared", "-fPIC", str(source), "-o", f"{folder}/x.so"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return Finding("compiler", WARN, f"{name} fails: {done.stderr.strip().splitlines()[-1:]}", fix)
    if not shutil.which("ninja"):
        return Finding("compiler", WARN, f"{name} works, ninja is not on PATH", "activate .venv, which contains ninja")
    return Finding("compiler", OK, f"{name} compiles, ninja is installed")


REINSTALL = "python -m pip install --force-reinstall --no-deps deepspeed"


def _optional(name: str, install: str, try_out: Callable[[], str | None], good: str, fix: str) -> Finding:
    """Check a package that the trainer can do without. ``install``: what pip takes, and what needs it.

    ``try_out`` returns what is wrong with the package, or None; ``good``: what is said if nothing is.
    """
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Finding(name, WARN, "not installed", f"python -m pip install {install}")
    if fault := try_out():
        return Finding(name, WARN, f"{version}: {fault}", remedy(fault, fix))
    return Finding(name, OK, version + good)


def deepspeed(build: bool) -> Finding:
    """DeepSpeed can be imported; with ``build``, its operation for this machine can be built and loaded."""
    cuda = torch.cuda.is_available()
    operation = "FusedAdamBuilder" if cuda else "ShareMemCommBuilder"
    script = "from deepspeed.accelerator import get_accelerator as a"
    script += f"; a().create_op_builder('{operation}').load(verbose=False)" if build else "; a()"
    try_out = partial(call, script, {} if cuda else {"DS_ACCELERATOR": "cpu"}, 600 if build else PATIENCE)
    good = ": its operations build and load" if build else " (--deep builds its operations)"
    fix = "see compiler above; then rm -rf ~/.cache/torch_extensions and try again" if build else REINSTALL
    return _optional("deepspeed", "deepspeed ninja; only --engine deepspeed needs it", try_out, good, fix)


RAY = """
import ray
ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
assert ray.get(ray.remote(lambda: 42).remote()) == 42
ray.shutdown()
"""


def ray(start: bool) -> Finding:
    """Ray is installed; with ``start``, it starts here and runs a task."""
    try_out = partial(call, RAY) if start else lambda: None
    good = ": starts and runs a task" if start else " (--deep starts it)"
    fix = "ray stop --force (ends an old Ray), make sure that /tmp and /dev/shm have free space, and try again"
    return _optional("ray", "'ray[tune]' optuna; only the search needs it", try_out, good, fix)
