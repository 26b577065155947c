"""The doctor's checks of versions, devices, disks, ports and speed. Each returns a Finding, with a fix if something is wrong."""

from __future__ import annotations

import os
import platform
import re
import resource
import shutil
import socket
import sys
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

from gdd_dist.engines.precision import resolve_precision
from gdd_dist.health.finding import FAIL, OK, WARN, Finding
from gdd_dist.runtime.memory import free_memory
from sharding.errors import UserError
from sharding.files import fsync_dir, write_atomic
from sharding.manifest import Manifest
from sharding.shards import decode

OLDEST_PYTHON = (3, 11)
LOW_SPACE, NO_SPACE = 5e9, 5e8
RENDEZVOUS_PORT, TENSORBOARD_PORT = 29500, 6006
SLOW_JPEG = 1_500.0
JPEG_SIDE, JPEG_SECONDS = 64, 0.3
LOOP_STEPS, LOOP_ROUNDS = 20, 3


def python() -> Finding:
    """The interpreter."""
    detail = f"{platform.python_version()} ({sys.executable})"
    if tuple(map(int, platform.python_version_tuple()[:2])) < OLDEST_PYTHON:
        return Finding("python", FAIL, detail, "install Python 3.11 or newer and run make env PYTHON=/path/to/it")
    return Finding("python", OK, detail)


def packages() -> list[Finding]:
    """Every requirement of the package is installed and new enough. One finding for the base, one for each extra."""
    from packaging.requirements import Requirement

    found, faults = Counter[str](), defaultdict[str, dict[str, str]](dict)
    for text in metadata.requires("gdd_dist") or []:
        requirement = Requirement(text)
        match = re.search(r"extra == ['\"]([\w-]+)['\"]", text)
        group = match[1] if match else "base"
        found[group] += 1
        try:
            have = metadata.version(requirement.name)
            if requirement.specifier.contains(have, prereleases=True):
                continue
            fault = f"{requirement.name} is {have}, but {requirement.specifier} is needed"
        except metadata.PackageNotFoundError:
            fault = f"{requirement.name} is missing"
        faults[group][fault] = text.partition(";")[0].strip()
    return [_package_finding(group, count, faults[group]) for group, count in found.items()]


def _package_finding(group: str, count: int, faults: dict[str, str]) -> Finding:
    """``faults``: what is wrong → the requirement, as pip takes it."""
    name = "packages" if group == "base" else f"extra {group}"
    if not faults:
        return Finding(name, OK, f"{count} of {count} installed and new enough")
    wanted = " ".join(f"'{text}'" for text in faults.values())
    fix = f"python -m pip install --upgrade {wanted}"
    return Finding(name, FAIL if group == "base" else WARN, "; ".join(faults), fix)


def torch_pair() -> Finding:
    """torch and torchvision match: the compiled part of torchvision can be loaded."""
    detail = f"torch {metadata.version('torch')}, torchvision {metadata.version('torchvision')}"
    try:
        import torchvision.ops

        torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    except (ImportError, RuntimeError, OSError) as e:
        fix = "python -m pip install --upgrade torch torchvision together: the two are released as a pair"
        return Finding("torch", FAIL, f"{detail}: {str(e).splitlines()[0]}", fix)
    return Finding("torch", OK, detail)


def devices() -> Finding:
    """GPUs, or why there are none; cores and memory."""
    cores = len(os.sched_getaffinity(0))
    here = f"{cores} cores, {free_memory() / 2**30:.1f} GiB of memory free"
    cuda = torch.cuda.is_available()
    here += f"; computes in {resolve_precision('auto', torch.device('cuda' if cuda else 'cpu'))}"
    if cuda:
        gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        names = ", ".join(f"{gpu.name} ({gpu.total_memory / 2**30:.0f} GiB)" for gpu in gpus)
        return Finding("devices", OK, f"{len(gpus)} CUDA: {names}; {here}")
    detail = f"no CUDA device; {here}"
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return Finding("devices", OK, f"CUDA_VISIBLE_DEVICES hides all GPUs; {detail}")
    if Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi"):
        why = "this torch was built without CUDA"
        fix = "python -m pip install --upgrade --force-reinstall torch torchvision (the default builds include CUDA)"
        if torch.version.cuda is not None:
            why = "the driver does not support this torch's CUDA version"
            fix = f"run nvidia-smi, and update the driver to one that supports CUDA {torch.version.cuda}"
        return Finding("devices", FAIL, f"there is an NVIDIA GPU, but {why}; {detail}", fix)
    return Finding("devices", OK, detail)


def disk(directory: Path, name: str = "disk") -> Finding:
    """Write, flush, rename, link and remove files in a directory, as runs do, and report the free space."""
    probe = directory / f".doctor-{os.getpid()}"
    made = not directory.exists()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_atomic(probe, b"x")
        os.link(probe, probe.with_suffix(".link"))
        probe.with_suffix(".symlink").symlink_to(probe.name)
        fsync_dir(directory)
        free = shutil.disk_usage(directory).free
    except OSError as e:
        reason = (e.strerror or str(e)).lower()
        there = next(d for d in (directory, *directory.absolute().parents) if d.exists())
        return Finding(name, FAIL, f"{directory}: {reason}", _disk_fix(reason, there))
    finally:
        for path in (probe, probe.with_suffix(".link"), probe.with_suffix(".symlink")):
            if path.is_symlink() or path.exists():
                path.unlink()
        if made and directory.is_dir() and not any(directory.iterdir()):
            directory.rmdir()
    detail = f"{directory}: writable, links work, {free / 1e9:.1f} GB free"
    if free < NO_SPACE:
        return Finding(name, FAIL, detail, "free some space, or point --out and --store to a larger disk")
    if free < LOW_SPACE:
        return Finding(name, WARN, detail, "check with gdd_dist.train --dry-run whether the free space is enough")
    return Finding(name, OK, detail)


def _disk_fix(reason: str, directory: Path) -> str:
    if "read-only" in reason:
        return f"mount -o remount,rw $(findmnt -n -o TARGET --target {directory}), or choose another --out"
    if "denied" in reason:
        return f"chown or chmod {directory}, or choose another --out"
    if "space" in reason or "quota" in reason:
        return "free some space, or point --out and --store to a larger disk"
    if "not permitted" in reason or "not supported" in reason:
        return "locks and latest links need hard and symbolic links, which this file system lacks; choose another --out"
    return "choose another --out"


def port(number: int, what: str, remedy: str) -> Finding:
    """Whether a TCP port is free on this host. ``remedy`` may contain {free}, which becomes the next free port."""
    if _is_free(number):
        return Finding(f"port {number}", OK, f"free ({what})")
    other = next((n for n in range(number + 1, number + 200) if _is_free(n)), number + 200)
    return Finding(f"port {number}", WARN, f"used by another program, but {what} needs it", remedy.format(free=other))


def ports() -> list[Finding]:
    """Check the two ports that programs use by default."""
    return [
        port(RENDEZVOUS_PORT, "torchrun over several nodes", "give torchrun --rdzv_endpoint=HOST:{free} on all nodes"),
        port(TENSORBOARD_PORT, "TensorBoard", "tensorboard --logdir runs --host 127.0.0.1 --port {free}"),
    ]


def host_name() -> Finding:
    """Whether this host's own name resolves; ranks and torchrun use it to connect, and would hang otherwise."""
    name = socket.gethostname()
    try:
        address = str(socket.getaddrinfo(name, None)[0][4][0])
    except (OSError, UnicodeError) as e:
        what = f"{name} does not resolve ({e}); torchrun over several processes may hang"
        fix = f"echo '127.0.1.1 {name}' >> /etc/hosts (on several nodes: their addresses)"
        return Finding("host name", WARN, what, f"{fix}, or give torchrun --standalone")
    return Finding("host name", OK, f"{name} is {address}")


def _is_free(number: int) -> bool:
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind(("0.0.0.0", number))
        except OSError:
            return False
    return True


def descriptors() -> Finding:
    """How many files a process may open; shards and logit files stay open while they are memory-mapped."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 1024:
        return Finding("open files", WARN, f"{soft} at most", "ulimit -n 4096 before the start")
    return Finding("open files", OK, f"{soft:,} at most")


def data_set(directory: Path) -> Finding:
    """A data set has a manifest, and its files have the sizes in the manifest."""
    try:
        manifest = Manifest.load(directory)
    except UserError as e:
        what, _, fix = str(e).rpartition("; ")
        return Finding("data", FAIL, what or str(e), fix)
    for split in manifest.splits.values():
        for shard in split.shards:
            path = directory / shard.file
            if not path.exists() or path.stat().st_size != shard.bytes:
                return Finding("data", FAIL, f"{path} is missing or truncated", "build or copy the data set again")
    splits = ", ".join(f"{name} {split.samples:,}" for name, split in manifest.splits.items())
    return Finding("data", OK, f"{manifest.name}: {splits} (python -m sharding verify checks every byte)")


def jpeg_speed() -> Finding:
    """Measure images per second with the loader's decoder, on one thread and on all cores."""
    import simplejpeg

    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    payload = simplejpeg.encode_jpeg(np.ascontiguousarray(noise.repeat(JPEG_SIDE // 8, 0).repeat(JPEG_SIDE // 8, 1)))
    threads = len(os.sched_getaffinity(0))

    def work(_: int) -> int:
        out, done, end = np.empty((JPEG_SIDE, JPEG_SIDE, 3), np.uint8), 0, time.monotonic() + JPEG_SECONDS
        while time.monotonic() < end:
            decode(payload, out)
            done += 1
        return done

    one = work(0) / JPEG_SECONDS
    with ThreadPoolExecutor(threads) as pool:
        every = sum(pool.map(work, range(threads))) / JPEG_SECONDS
    detail = f"{one:,.0f} images/s on one thread, {every:,.0f} on {threads} ({JPEG_SIDE}×{JPEG_SIDE})"
    if one < SLOW_JPEG:
        fix = "try again if the machine is busy; else python -m pip install --force-reinstall simplejpeg"
        return Finding("jpeg", WARN, detail, fix)
    return Finding("jpeg", OK, detail)


def torch_speed() -> Finding:
    """Time a fixed loop of training steps. Quote it with every wall time, because machines differ by a factor of two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # one thread is least disturbed by other processes
    try:
        seconds = _loop_time(torch.device("cpu"))
    finally:
        torch.set_num_threads(before)
    detail = f"{LOOP_STEPS} steps of a fixed training loop: {seconds:.2f} s on one CPU thread"
    if torch.cuda.is_available():
        detail += f", {_loop_time(torch.device('cuda')):.3f} s on the GPU"
    return Finding("speed", OK, f"{detail}; quote this with any wall time")


def _loop_time(device: torch.device) -> float:
    """Return the seconds of LOOP_STEPS steps of two convolutions of width 32 on 16 float32 images of 32×32: the best round."""
    images = torch.zeros(16, 3, 32, 32, device=device)
    kernels = [torch.full((32, c, 3, 3), 0.01, device=device, requires_grad=True) for c in (3, 32)]

    def steps(count: int) -> float:
        begin = time.monotonic()
        for _ in range(count):
            x = images
            for kernel in kernels:
                x = torch.nn.functional.conv2d(x, kernel, padding=1).relu()
            x.sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.monotonic() - begin

    steps(2)  # warm-up: allocates memory and chooses kernels
    return min(steps(LOOP_STEPS) for _ in range(LOOP_ROUNDS))
