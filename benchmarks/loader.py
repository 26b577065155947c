"""Images per second out of shards: ours against stock webdataset, mosaicml-streaming (if installed) and a folder read by PIL.

    python benchmarks/loader.py [--data DATA] [--images 6000] [--rounds 5] [--threads N] [--batch 128]

Without --data it makes 64x64 JPEGs of its own. All sides read the same images, in turns, round after round; a ratio is the median of
the rounds' ratios. Prints one JSON line for each setting:

    loader/thread    one thread, against the others without worker processes; cpu_ratio is by CPU time, which other jobs hardly touch
    loader/process   one process with all threads, against the others without worker processes
    loader/all       all cores: ours against the others at their best number of workers
    loader/bare      ours against simplejpeg and Pillow alone: the same images in the same order, their bytes in the page cache, same threads
    loader/resident  decoded images kept, against ours that decodes them

The first three come again against webdataset alone ("…, webdataset"), and against webdataset that shuffles, as ours does ("…, shuffled
webdataset"): webdataset/N reads in order, which is faster, webdataset-shuffled/N by its recipe for training, a buffer of 1,000 samples.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
from common import line
from made_up import jpegs
from PIL import Image
from torchvision.datasets import ImageFolder

from gdd_dist.data.images import Images, prefetch
from gdd_dist.data.order import Order, default_streams
from sharding.manifest import Manifest
from sharding.pool import available_cores
from sharding.shards import Shards, decode

Rates = tuple[float, float]
"""Images per second of wall time, and of this process's CPU time, which other jobs on the machine hardly touch."""
Side = Callable[[], Rates]
"""Reads some images."""


def timed(batches: Iterable[Any], count: Callable[[Any], int], images: int) -> Rates:
    """Rates from the first batch on, which pays for the start of workers."""
    seen, begin, cpu = 0, 0.0, 0.0
    for batch in batches:
        if begin == 0.0:
            begin, cpu = time.perf_counter(), time.process_time()
            continue
        seen += count(batch)
        if seen >= images:
            break
    return seen / (time.perf_counter() - begin), seen / (time.process_time() - cpu)


def ours(data: Path, images: int, batch: int, threads: int, resident: str, cache: Path) -> Side:
    """Our loader, in the order of training: shuffled, from all streams."""
    reader = Images(data, Manifest.load(data), "train", threads=threads, resident=resident, cache=cache)
    order = Order(reader.shards.shard_samples, batch, default_streams(batch), seed=0)
    position = [0]
    if resident != "none":
        reader.read(np.arange(len(reader)))  # every page once

    def side() -> Rates:
        start = position[0]
        position[0] += images // batch + 1
        return timed(prefetch(lambda s: reader.read(order.batch(s)), start, position[0] + 1, 2), len, images)

    return side


def bare(data: Path, images: int, batch: int, threads: int) -> Side:
    """The decoder alone, on the images that `ours` reads, in its order: where their bytes lie is found before the clock starts."""
    shards = Shards(data, manifest := Manifest.load(data), "train")
    order = Order(shards.shard_samples, batch, default_streams(batch), seed=0)
    space = "RGB" if manifest.channels == 3 else "GRAY"
    position = [0]

    def some(payloads: list[memoryview]) -> None:
        out = np.empty((batch, manifest.height, manifest.width, manifest.channels), np.uint8)
        for i, payload in enumerate(payloads):
            if payload[0] == 0xFF:
                simplejpeg.decode_jpeg(payload, space, False, False, 0, 0, 1, out[i % batch])
            else:
                decode(payload, out[i % batch])

    def side() -> Rates:
        start = position[0]
        position[0] += images // batch + 1
        payloads = shards.payloads(np.concatenate([order.batch(s) for s in range(start, position[0])]))
        with ThreadPoolExecutor(threads) as pool:
            begin, cpu = time.perf_counter(), time.process_time()
            list(pool.map(some, [payloads[k::threads] for k in range(threads)]))
            return len(payloads) / (time.perf_counter() - begin), len(payloads) / (time.process_time() - cpu)

    return side


def webdataset(data: Path, images: int, batch: int, workers: int, shuffle: bool = False) -> Side:
    """Stock webdataset: decode("rgb8"), batched in the workers, as its documentation says."""
    import webdataset as wds

    urls = sorted(str(p) for p in (data / "train").glob("*.tar"))
    workers = min(workers, len(urls))

    def side() -> Rates:
        dataset = wds.WebDataset(urls, shardshuffle=len(urls) if shuffle else False)
        dataset = dataset.shuffle(1000) if shuffle else dataset
        stages = dataset.decode("rgb8").to_tuple("jpg;png;webp", "cls").batched(batch)
        loader = wds.WebLoader(stages.repeat(), batch_size=None, num_workers=workers)
        return timed(loader, lambda b: len(b[1]), images)

    return side


def mosaic(folder: Path, data: Path, images: int, batch: int, workers: int) -> Side:
    """mosaicml-streaming over the same images in its own format."""
    import streaming

    target = folder / "mosaic"
    if not target.exists():
        shards = Shards(data, Manifest.load(data), "train")
        columns = {"image": "bytes", "label": "int"}
        with streaming.MDSWriter(out=str(target), columns=columns) as writer:
            for i in range(min(images, shards.samples)):
                writer.write({"image": bytes(shards.payload(i)), "label": int(shards.labels[i])})

    class Set(streaming.StreamingDataset):
        def __getitem__(self, at: int) -> Any:
            import io

            sample = super().__getitem__(at)
            return np.asarray(Image.open(io.BytesIO(sample["image"])).convert("RGB")), sample["label"]

    def side() -> Rates:
        dataset = Set(local=str(target), shuffle=False, batch_size=batch)
        return timed(torch.utils.data.DataLoader(dataset, batch, num_workers=workers), lambda b: len(b[1]), images // 2)

    return side


def folder_of_files(folder: Path, data: Path, images: int, batch: int, workers: int) -> Side:
    """torchvision's ImageFolder with PIL over the same images, one file each."""
    target = folder / "files"
    if not target.exists():
        shards = Shards(data, Manifest.load(data), "train")
        for i in range(min(images, shards.samples)):
            path = target / f"{int(shards.labels[i]):04d}" / f"{i:06d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(shards.payload(i))
    dataset = ImageFolder(str(target), transform=as_tensor)

    def side() -> Rates:
        loader = torch.utils.data.DataLoader(dataset, batch, shuffle=True, num_workers=workers)
        return timed(loader, lambda b: len(b[1]), images // 2)

    return side


def as_tensor(image: Image.Image) -> torch.Tensor:
    """uint8 [H, W, C]."""
    return torch.from_numpy(np.asarray(image.convert("RGB")).copy())


def report(sides: dict[str, Side], rounds: int, settings: dict[str, Any]) -> None:
    """Let all sides read in turns and print the lines."""
    found: dict[str, list[Rates]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, side in sides.items():
            rate = side()
            if number:  # the first round warms the page cache
                found[name].append(rate)
    wall = {name: np.array(values)[:, 0] for name, values in found.items()}
    cpu = {name: np.array(values)[:, 1] for name, values in found.items()}
    most, resident = f"ours/{settings['threads']}", f"ours-resident/{settings['threads']}"
    others = [n for n in sides if not n.startswith(("ours", "bare", "webdataset-shuffled"))]
    alone = [n for n in others if n.endswith("/0")]
    pairs = [
        ("loader/thread", "ours/1", alone),
        ("loader/process", most, alone),
        ("loader/all", most, others),
        ("loader/bare", "ours/1", ["bare/1"]),
        ("loader/bare", most, [most.replace("ours", "bare")]),
        ("loader/resident", "ours-resident/1", ["ours/1"]),
        ("loader/resident", resident, [most]),
    ]
    first = pairs[:3]
    for words, kind in (("webdataset", "webdataset/"), ("shuffled webdataset", "webdataset-shuffled/")):
        for name, mine, names in first:
            counts = {n.partition("/")[2] for n in names}
            pairs.append((f"{name}, {words}", mine, [kind + n for n in sorted(counts)]))
    for benchmark, mine, names in pairs:
        one = [n for n in names if n.endswith("/0") or n.startswith(("ours", "bare"))]
        text = line(benchmark, wall[mine], {n: wall[n] for n in names}, "images/s", {**settings, "ours": mine})
        if one == names and mine.endswith("/1"):
            text["cpu_ratio"] = line("", cpu[mine], {n: cpu[n] for n in names}, "", {})["ratio"]
        print(json.dumps(text), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a data set of python -m sharding build (default: made up)")
    parser.add_argument(
        "--images", type=int, default=6000, help="images that each side reads in a round (default 6000)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds, after one that is not counted (default 5)")
    parser.add_argument(
        "--threads", type=int, default=available_cores(), help="threads and workers (default: all cores)"
    )
    parser.add_argument("--batch", type=int, default=128, help="images of a batch (default 128)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="gdd-benchmark-") as scratch:
        folder = Path(scratch)
        data = args.data or jpegs(folder, args.images)
        read, cache = (data, args.images, args.batch), folder / "cache"
        sides: dict[str, Side] = {}
        for threads in sorted({1, args.threads}):
            sides[f"ours/{threads}"] = ours(*read, threads, "none", cache)
            sides[f"bare/{threads}"] = bare(*read, threads)
            sides[f"ours-resident/{threads}"] = ours(*read, threads, "ram", cache)
        for workers in sorted({0, args.threads}):
            sides[f"webdataset/{workers}"] = webdataset(*read, workers)
            sides[f"webdataset-shuffled/{workers}"] = webdataset(*read, workers, shuffle=True)
            sides[f"ImageFolder/{workers}"] = folder_of_files(folder, *read, workers)
            if importlib.util.find_spec("streaming"):
                sides[f"mosaicml-streaming/{workers}"] = partial(mosaic, folder)(*read, workers)
        settings = {"data": str(args.data.name if args.data else "made up"), "images": args.images, "batch": args.batch}
        report(sides, args.rounds, {**settings, "threads": args.threads, "rounds": args.rounds})


if __name__ == "__main__":
    sys.exit(main())
