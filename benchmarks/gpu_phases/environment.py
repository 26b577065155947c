"""What there is: device, memory, libraries; and whether the device computes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import torch
from common import machine, versions

from gdd_dist.runtime.devices import pick_device
from gdd_dist.runtime.memory import free_memory
from gdd_dist.runtime.versions import commit
from gpu_phases import Line, Task

LIBRARIES = (
    "torch",
    "torchvision",
    "numpy",
    "safetensors",
    "tensorboard",
    "matplotlib",
    "pillow",
    "simplejpeg",
    "jsonargparse",
    "webdataset",
    "triton",
)


def find(task: Task) -> Iterator[Line]:
    """One line. Raises where the device is not there or computes wrongly."""
    device = pick_device(task.device, 0, 1)
    found: Line = {"machine": machine(), "versions": versions(*LIBRARIES), "commit": commit(), "device": str(device)}
    found["compilers"] = [name for name in ("cc", "gcc", "g++", "ninja", "nvcc") if shutil.which(name)]
    found["disk_free"], found["memory_free"] = shutil.disk_usage(task.out).free, free_memory()
    found["environment"] = {k: v for k, v in os.environ.items() if k.startswith(("CUDA_", "NCCL_", "OMP_", "TORCH"))}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = {
            "name": properties.name,
            "memory": properties.total_memory,
            "capability": f"{properties.major}.{properties.minor}",
            "processors": properties.multi_processor_count,
            "bf16": torch.cuda.is_bf16_supported(including_emulation=False),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        }
    a, b = (torch.randn(64, 64, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    product = (a.double() @ b.double()).float()
    found["product_off"] = float(((a.to(device) @ b.to(device)).cpu() - product).abs().max())
    images, weight = a.view(1, 1, 64, 64), b[:9, :9].reshape(9, 1, 3, 3)
    convolved = torch.nn.functional.conv2d(images.double(), weight.double()).float()
    found["convolution_off"] = float(
        (torch.nn.functional.conv2d(images.to(device), weight.to(device)).cpu() - convolved).abs().max()
    )
    yield found
    assert found["product_off"] < 0.1, "the device computes products wrongly"
    assert found["convolution_off"] < 0.1, "the device computes convolutions wrongly"
