"""The program that turns a generator into a data set on disk: python -m gdd_dist.export OUT DEST --ipc 10 --format webdataset."""

from __future__ import annotations

import argparse
import io
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from gdd_dist.config.settings import CONDENSED
from gdd_dist.product.whole_directory import check_new, whole_directory
from gdd_dist.runtime.arguments import Parser
from gdd_dist.runtime.monitor import Monitor
from gdd_dist.runtime.run_program import run_program
from gdd_dist.runtime.versions import versions
from sharding.encode import Stored, mean_and_std, moments, write_tar
from sharding.errors import UserError
from sharding.files import write_atomic
from sharding.manifest import Manifest, ShardInfo, SplitInfo

if TYPE_CHECKING:  # a command line is read, and refused, without torch
    from gdd_dist.product.card import Drawn
    from gdd_dist.product.sampler import Sampler
    from gdd_dist.runtime.world import World

SHARD_IMAGES = 10_000
CHUNK = 1_000
ROOM_IMAGES = 64
"""Number of images from which the size of the set is estimated."""


@dataclass(frozen=True)
class Part:
    """Consecutive images of the set: uint8 [n, H, W, C], labels int64 [n], soft float32 [n, K] or None."""

    first: int
    images: np.ndarray
    labels: np.ndarray
    soft: np.ndarray | None

    def samples(self) -> Iterator[Stored]:
        """Yield each image as a PNG with its label."""
        for i, (image, label) in enumerate(zip(self.images, self.labels.tolist(), strict=True)):
            extras = {} if self.soft is None else {"soft.npy": npy(self.soft[i])}
            yield Stored(f"{self.first + i:06d}", label, "png", png(image), extras)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = Parser(
        allow_abbrev=False,
        prog="python -m gdd_dist.export",
        example="python -m gdd_dist.export runs/digits sets/digits-10 --ipc 10 --labels soft",
        description="Draw a distilled set from a finished run's generator and write it, with a card (README.md), into the directory DEST.",
    )
    text = "run directory of gdd_dist.train, or a generator.safetensors (hard labels only)"
    p.add_argument("out", metavar="OUT", help=text)
    p.add_argument("dest", metavar="DEST", help="directory to write, new or empty")
    what = p.add_argument_group("what is drawn")
    size = what.add_mutually_exclusive_group(required=True)
    size.add_argument("--ipc", type=int, metavar="N", help="images of each class")
    size.add_argument("--total", type=int, metavar="N", help="images in total, balanced over the classes")
    text = "soft: the teachers' mean softmax beside the class (default: hard)"
    what.add_argument("--labels", choices=("hard", "soft"), default="hard", help=text)
    what.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the set (default: 0)")
    text = "cut latents at ± T: more typical, less varied images (default: no cut)"
    what.add_argument("--truncation", type=float, metavar="T", help=text)
    text = "steps in which the teachers move the set's latents, so that a fixed set teaches more; needs OUT's data (default: 0, none)"
    what.add_argument("--condense", type=int, default=0, metavar="STEPS", help=text)
    what.add_argument("--data", metavar="DIR", help="for --condense: the data set, if it was moved since the run")
    how = p.add_argument_group("how it is written")
    text = "webdataset: tar shards with a manifest; folder: PNGs by class; npz: one numpy file (default: webdataset)"
    how.add_argument("--format", choices=tuple(WRITERS), default="webdataset", help=text)
    text = "license named in the card, such as cc-by-4.0; it must suit the data that was distilled (default: unknown)"
    how.add_argument("--licence", default="unknown", metavar="NAME", help=text)
    text = "auto, cpu or cuda (default: auto, CUDA if there is a GPU)"
    how.add_argument("--device", default="auto", metavar="NAME", help=text)
    how.add_argument("--debug", action="store_true", help="show tracebacks")
    return p


def main(argv: Sequence[str], joined: Callable[[World], None] = lambda world: None) -> None:
    """Draw the set, write it, and print its path."""
    arguments = parser().parse_args(argv)
    if (arguments.total if arguments.ipc is None else arguments.ipc) < 1:
        raise UserError("the set would have no images; give --ipc or --total of at least 1")
    if arguments.condense < 0 or arguments.condense and (arguments.ipc is None or arguments.truncation is not None):
        raise UserError("--condense needs a number of steps above 0 and --ipc, and takes no --truncation")
    if arguments.condense and arguments.ipc > CONDENSED:
        raise UserError(f"--condense moves all images of a class together; give --ipc of at most {CONDENSED}")
    dest = Path(arguments.dest)
    if arguments.condense and Path(arguments.out).is_file():
        raise UserError("--condense needs the run's teachers and data; give the run directory (OUT) instead of a file")
    check_new(dest)
    from gdd_dist.product.card import Drawn, card, sample_picture
    from gdd_dist.product.sampler import load_generator

    generator = load_generator(arguments.out, arguments.device)
    if generator.device.type == "meta":  # possible if a Python program calls this
        raise UserError("device meta cannot draw images; give auto, cpu or cuda")
    total = arguments.total or arguments.ipc * len(generator.classes)
    a, soft = arguments, arguments.labels == "soft"
    drawn = Drawn(total, a.ipc, a.format, soft, a.seed, a.truncation, a.licence, a.condense)
    with whole_directory(dest, "README.md") as work:
        check_room(generator, drawn, work)
        if arguments.condense:
            generator = condensed_set(generator, arguments, joined)
        WRITERS[drawn.format](generator, drawn, draw(generator, drawn), work)
        write_atomic(work / "samples.png", sample_picture(generator, drawn))
        text = card(generator, drawn, Path(arguments.out))
        write_atomic(work / "README.md", text.encode("utf-8", "backslashreplace"))
    what = f"{total:,} images of {len(generator.classes)} classes"
    sys.stdout.write(f"{what}: {dest} (how to read it: {dest}/README.md)\n")


def condensed_set(generator: Sampler, arguments: argparse.Namespace, joined: Callable[[World], None]) -> Sampler:
    """Return a sampler of the set that the run's teachers condense, as in the report's rows. Raises UserError without a run directory."""
    from gdd_dist.config.command_line import settings_of
    from gdd_dist.evaluation.students import Frozen
    from gdd_dist.pipeline.finished_run import opened
    from gdd_dist.product.condensed_set import CondensedSet
    from gdd_dist.training.condense import condensed

    given = ["--device", arguments.device, *(["--data", arguments.data] if arguments.data else [])]
    config, a = settings_of(Path(arguments.out), *given), arguments
    ctx, _, directories = opened(Path(a.out), config, ("teachers", "matching"), joined)
    frozen = Frozen(ctx, directories)
    monitor = ctx.passing("export: condensing", a.condense)
    images = condensed(
        ctx, frozen.generator("matched"), frozen.teachers, a.ipc, a.seed, "export", a.condense, monitor.advance
    )
    monitor.close()
    return CondensedSet(generator, images)


def check_room(generator: Sampler, drawn: Drawn, directory: Path) -> None:
    """Raise UserError if the set, estimated from a few images, does not fit on the disk or in memory, or cannot be labelled."""
    import torch

    from gdd_dist.runtime.memory import all_memory

    few, _ = generator.balanced(min(drawn.total, ROOM_IMAGES), drawn.seed, drawn.truncation)
    images = few.cpu().permute(0, 2, 3, 1)
    if drawn.soft:  # a fault of the teachers or of config.yaml is learnt before anything is written
        generator.soft_labels(few)
    soft = 4 * len(generator.classes) if drawn.soft else 0
    disk = drawn.total * (sum(len(png(image)) for image in images.numpy()) / len(images) + soft)
    array = drawn.total * (images[0].numel() + soft) if drawn.format == "npz" else 0
    free, host = shutil.disk_usage(directory).free, all_memory(torch.device("cpu"))
    for need, have, where in ((disk, free, "free on the disk of DEST"), (array, host, "of memory for one array")):
        if need > have:
            what = f"{drawn.total:,} images take about {need / 1e9:,.1f} GB"
            raise UserError(f"{what}, but there are only {have / 1e9:,.1f} GB {where}; ask for fewer images")


def draw(generator: Sampler, drawn: Drawn) -> Iterator[Part]:
    """Yield the set in parts: image i has class i mod K, so that every shard has nearly the same class mix."""
    monitor = Monitor(None, "export", drawn.total, unit="image", passing=True)
    for first in range(0, drawn.total, CHUNK):
        many = min(CHUNK, drawn.total - first)
        images, labels = generator.balanced(many, drawn.seed, drawn.truncation, first)
        soft = generator.soft_labels(images).cpu().numpy() if drawn.soft else None
        yield Part(first, images.cpu().permute(0, 2, 3, 1).contiguous().numpy(), labels, soft)
        monitor.advance(min(first + CHUNK, drawn.total))
    monitor.close()


def write_webdataset(generator: Sampler, drawn: Drawn, parts: Iterator[Part], work: Path) -> None:
    """Write a DATA directory with only a train split: train/000000.tar, its index, manifest.json."""
    channels, height, width = generator.image_shape
    sums, shards = np.zeros((2, channels), np.int64), list[ShardInfo]()
    (work / "train").mkdir()

    def samples() -> Iterator[Stored]:
        for part in parts:
            for image in part.images:
                np.add(sums, moments(image), out=sums)
            yield from part.samples()

    stream = samples()
    for shard in range(-(-drawn.total // SHARD_IMAGES)):
        count = min(SHARD_IMAGES, drawn.total - shard * SHARD_IMAGES)
        shards.append(write_tar(work, f"train/{shard:06d}.tar", (next(stream) for _ in range(count))))
    for _ in stream:
        raise AssertionError("more images than shards have room for")
    classes = len(generator.classes)
    counts = np.bincount(np.arange(drawn.total) % classes, minlength=classes)
    mean, std = mean_and_std(sums, drawn.total * height * width)
    splits = {"train": SplitInfo(drawn.total, tuple(counts.tolist()), tuple(shards))}
    name, size = f"{generator.data_name}-distilled", (height, width, channels)
    Manifest(name, generator.classes, *size, mean, std, versions(), splits).save(work)


def write_folder(generator: Sampler, _: Drawn, parts: Iterator[Part], work: Path) -> None:
    """Write DEST/0007_name/000123.png; folders sort by class number."""
    folders = [work / f"{c:04d}_{safe(name)}" for c, name in enumerate(generator.classes)]
    for folder in folders:
        folder.mkdir()
    for part in parts:
        for sample in part.samples():
            path = folders[sample.label] / f"{sample.key}.{sample.suffix}"
            path.write_bytes(sample.payload)
            for suffix, extra in sample.extras.items():
                path.with_suffix(f".{suffix}").write_bytes(extra)


def write_npz(generator: Sampler, drawn: Drawn, parts: Iterator[Part], work: Path) -> None:
    """Write DEST/train.npz: images uint8 [N, C, H, W], labels int64 [N], soft float32 [N, K] if asked for, classes [K]. No pickle."""
    kept = list(parts)
    arrays = {
        "images": np.concatenate([p.images for p in kept]).transpose(0, 3, 1, 2),
        "labels": np.concatenate([p.labels for p in kept]),
        "classes": np.array(generator.classes, dtype=np.str_),
    }
    if drawn.soft:
        arrays["soft"] = np.concatenate([p.soft for p in kept if p.soft is not None])
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    write_atomic(work / "train.npz", buffer.getvalue())


WRITERS = {"webdataset": write_webdataset, "folder": write_folder, "npz": write_npz}


def safe(name: str) -> str:
    """Return a class name that can be part of a file name."""
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name)[:80]


def png(image: np.ndarray) -> bytes:
    """uint8 [H, W, C] as a PNG file."""
    stream = io.BytesIO()
    Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image).save(stream, "PNG")
    return stream.getvalue()


def npy(array: np.ndarray) -> bytes:
    """An array as a .npy file."""
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


if __name__ == "__main__":
    run_program(main, sys.argv[1:])
