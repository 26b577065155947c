"""The data set out of CIFAR-10's archive with all workers, and how fast it is read; kept decoded or not, images are the same bytes."""

from __future__ import annotations

import io
import pickle
import shutil
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from gdd_dist.data.images import Images, prefetch
from gdd_dist.runtime.devices import pick_device
from gpu_phases import Line, Task
from sharding.manifest import Manifest
from sharding.options import Options
from sharding.pool import available_cores
from sharding.writer import build

WORKERS, IMAGES, SMALL = 16, 10_000, 200
"""Worker processes; images of a file of CIFAR-10, and of a rehearsal's."""
BATCH, BATCHES = 256, 40


def find(task: Task) -> Iterator[Line]:
    """A line of building, one of reading for each place where decoded images may stay."""
    data = task.out / "data"
    begin = time.perf_counter()
    if not (data / "manifest.json").exists():
        source = (
            task.source or f"cifar10:{made_up(task.out / 'cifar-10-python.tar.gz', SMALL if task.small else IMAGES)}"
        )
        build(source, data, Options(workers=2 if task.small else WORKERS))
    seconds = time.perf_counter() - begin
    manifest = Manifest.load(data)
    total = sum(split.samples for split in manifest.splits.values())
    source = task.source or "made up"
    yield {
        "built": source,
        "images": total,
        "seconds": round(seconds, 2),
        "images_per_second": round(total / seconds, 1),
    }
    device, seen = pick_device(task.device, 0, 1), {}
    rows = [np.random.default_rng(i).integers(0, manifest.splits["train"].samples, BATCH) for i in range(BATCHES)]
    for resident in ("none", "ram", "device"):
        images = Images(
            data,
            manifest,
            "train",
            threads=available_cores(),
            resident=resident,
            cache=task.out / "cache",
            device=device,
        )
        seen[resident] = images.read(rows[0]).cpu()  # whatever is kept is there now
        begin = time.perf_counter()
        for _ in prefetch(lambda i, images=images: images.read(rows[i]), 0, BATCHES, 2):
            pass
        if device.type == "cuda":
            torch.cuda.synchronize()
        rate = BATCH * BATCHES / (time.perf_counter() - begin)
        equal = torch.equal(seen[resident], seen["none"])
        yield {"resident": resident, "images_per_second": round(rate), "equal": equal}
        assert equal, f"images kept in {resident} differ"
    shutil.rmtree(task.out / "cache")


def made_up(path: Path, images: int) -> Path:
    """An archive in the published format of CIFAR-10, of smooth noise about a colour for each class."""
    draw = np.random.default_rng(0)
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:

        def add(name: str, content: dict[str, object]) -> None:
            text = pickle.dumps(content, protocol=2)
            entry = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text))

        for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
            labels = np.arange(images) % 10
            coarse = draw.integers(0, 120, (images, 3, 4, 4)) + 12 * labels[:, None, None, None]
            fine = np.kron(coarse, np.ones((8, 8), int)) + draw.integers(0, 16, (images, 3, 32, 32))
            add(name, {"data": fine.astype(np.uint8).reshape(images, -1), "labels": labels.tolist()})
        add("batches.meta", {"label_names": [f"class-{c}" for c in range(10)]})
    return path
