"""What students learn from one Gaussian a class, by components, spread, shrinkage and bytes, beside real images.

    python -m sharding build folder:CIFAR10.tar DATA
    python benchmarks/gaussian.py DATA [--vary] [--precision bf16] [--components 64 128 256 384] [--spreads 0.7 0.8 0.9 1.0]

Prints a JSON line for each row: accuracy on val of each student; for the rows that are real and the Gaussian that val chose, and
for those named by --also, accuracy on test, measured after the choice. With --teachers (a finished step's directory) come rows of
what teachers choose: ``best``, of n draws the one to which they give its class most; ``refit``, the Gaussian of such draws.
The students of one number share first weights, labels, latents and augmentation in all rows but ``best``, whose latents are its own.
Bytes are those of the generator's file, or of the JPEG or PNG files alone.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import machine, versions
from safetensors.torch import save
from torch import Tensor

from gdd_dist.data.augment import AUGMENT_DRAWS, augment
from gdd_dist.data.images import Images, to_float, to_uint8
from gdd_dist.data.noise import normal, permutation, uniform
from gdd_dist.data.order import dealt
from gdd_dist.models.classifiers import Classifier, build_classifier
from gdd_dist.models.files import read_teachers
from gdd_dist.models.gaussian import LinearGenerator, pack, unpack
from gdd_dist.training.classifier_fit import predict, sgd, train_step
from gdd_dist.training.gaussian_fit import Gaussians, moments
from gdd_dist.training.skipped_steps import Skips
from gdd_dist.training.soft_labels import soft_labels
from sharding.manifest import Manifest

PART = 2048
CPU = torch.device("cpu")

Draw = Callable[[int, Tensor], Tensor]
"""``draw(student, labels)`` → uint8 [n, C, H, W], all that a student sees."""


@dataclass
class Row:
    """What students are trained on; ``test`` where it is measured on test whatever val says."""

    name: str
    settings: dict[str, Any]
    bytes: int | None
    draw: Draw
    test: bool


class Study:
    """Data, protocol and students."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.manifest = args, Manifest.load(args.data)
        self.classes, self.channels, self.size = (
            len(self.manifest.classes),
            self.manifest.channels,
            self.manifest.height,
        )
        self.splits = {s: Images(args.data, self.manifest, s, resident="none") for s in ("train", "val", "test")}
        self.members = [np.flatnonzero(self.splits["train"].labels == c) for c in range(self.classes)]
        self.students = range(args.first, args.first + args.students)
        self.mean = [2 * m - 1 for m in self.manifest.mean]

    def labels(self, student: int) -> Tensor:
        """Even over classes in each batch, or over batches where these are smaller."""
        places = np.arange(self.args.steps * self.args.batch)
        return torch.from_numpy(dealt(student, "labels", places, self.classes))

    def train(self, row: Row, student: int) -> Classifier:
        """A student of a row."""
        a, labels = self.args, self.labels(student)
        torch.manual_seed(1000 + student)
        shape = {"channels": self.channels, "size": self.size, "classes": self.classes}
        net = build_classifier(a.student, **shape, mean=self.mean, std=[2 * s for s in self.manifest.std])
        optimizer, skips = sgd(net, 0.01, 0.9, 5e-4), Skips()
        images = row.draw(student, labels)
        for step in range(a.steps):
            here = slice(step * a.batch, (step + 1) * a.batch)
            draws = torch.from_numpy(uniform(student, "augment", step, np.arange(a.batch), AUGMENT_DRAWS))
            x = augment(to_float(images[here], CPU), draws, flip=a.flip, fill=self.mean)
            skips.note(train_step(net, optimizer, x, labels[here], 0.01, a.precision))
        return net

    def accuracy(self, net: Classifier, split: str) -> float:
        """Percent of each ``every``-th image of test, of all of val."""
        images, every = self.splits[split], self.args.every if split == "test" else 1
        n = len(images) // every
        answers = predict(net, lambda i: images.read(i * every), n, CPU, self.args.precision).argmax(1).numpy()
        return 100 * float((answers == images.labels[: n * every : every]).mean())

    def fit(self, sketches: int) -> Gaussians:
        """The Gaussians of train."""
        images = self.splits["train"]

        def read(part: int) -> tuple[Tensor, Tensor]:
            indices = np.arange(part * PART, min(len(images), (part + 1) * PART))
            return images.read(indices), torch.from_numpy(images.labels[indices])

        parts, pixels = range(-(-len(images) // PART)), self.channels * self.size**2
        k = min(max(self.args.components), pixels, len(images) - self.classes)
        sums = moments(read, parts, pixels=pixels, classes=self.classes, components=k, sketches=sketches)
        return Gaussians(sums)

    def real(self, student: int, labels: Tensor) -> Tensor:
        """Real images."""
        return self.among("real", self.members, student, labels)

    def fixed(self, budget: int, student: int, labels: Tensor) -> Tensor:
        """Of the real images that fit the budget together, another set for each student."""
        return self.among("fixed", self.within(budget, student)[0], student, labels)

    def among(self, purpose: str, members: list[np.ndarray], student: int, labels: Tensor) -> Tensor:
        """None of a class again before all of it came."""
        out = np.empty(len(labels), np.int64)
        for c, samples in enumerate(members):
            here = np.flatnonzero(labels.numpy() == c)
            out[here] = samples[dealt(student, f"{purpose}/{c}", np.arange(len(here)), len(samples))]
        return self.splits["train"].read(out)

    @lru_cache(maxsize=32)  # noqa: B019
    def within(self, budget: int, student: int) -> tuple[list[np.ndarray], int]:
        """As many images of each class as fit ``budget`` bytes, and their bytes."""
        drawn = [m[permutation(student, f"set/{c}", 0, len(m))] for c, m in enumerate(self.members)]
        most = min(map(len, drawn))
        sizes = [[len(p) for p in self.splits["train"].shards.payloads(m[:most])] for m in drawn]
        totals = np.cumsum(np.sum(sizes, axis=0))
        n = max(1, int(np.searchsorted(totals, budget, side="right")))
        return [m[:n] for m in drawn], int(totals[n - 1])

    @lru_cache(maxsize=16)  # noqa: B019
    def latents(self, student: int) -> Tensor:
        """The first K serve a generator of K components."""
        slots = np.arange(self.args.steps * self.args.batch)
        return torch.from_numpy(normal(student, "latents", 0, slots, max(self.args.components)))

    def drawn(self, net: LinearGenerator, student: int, labels: Tensor) -> Tensor:
        """Images of a generator as users get them."""
        latents = self.latents(student)[:, : net.latent]
        return torch.cat([to_uint8(net(z, y)) for z, y in zip(latents.split(500), labels.split(500), strict=True)])


class Chooser:
    """Draws of which teachers give their class the largest share."""

    def __init__(self, study: Study, directory: Path) -> None:
        self.study = study
        shape = study.channels, study.size, study.classes
        self.teachers = [t.load(*shape) for t in read_teachers(directory) if t.last]

    def among(self, net: LinearGenerator, z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Of latents [n, B, K] the best of each column: uint8 images [B, C, H, W], latents [B, K]."""
        n, b, _ = z.shape
        images = torch.cat([to_uint8(net(part, y)) for part, y in self._parts(z, labels)])
        shares = soft_labels(self.teachers, to_float(images, CPU), 1.0, "float32")
        best = shares[torch.arange(n * b), labels.repeat(n)].view(n, b).argmax(0)
        every = torch.arange(b)
        return images.view(n, b, *images.shape[1:])[best, every], z[best, every]

    @staticmethod
    def _parts(z: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(z.flatten(0, 1).split(500), labels.repeat(len(z)).split(500), strict=True)

    def drawn(self, net: LinearGenerator, n: int, student: int, labels: Tensor) -> Tensor:
        """The best of n draws."""
        z = torch.from_numpy(normal(student, "best", 0, np.arange(n * len(labels)), net.latent))
        parts = zip(z.view(n, len(labels), -1).split(500, 1), labels.split(500), strict=True)
        return torch.cat([self.among(net, some, y)[0] for some, y in parts])

    def refit(self, net: LinearGenerator, n: int, count: int = 2000) -> LinearGenerator:
        """A generator whose classes have mean and covariance of ``count`` best of n draws; the covariance half as before."""
        other, k = copy.deepcopy(net), net.latent
        for y in range(self.study.classes):
            z = torch.from_numpy(normal(y, "refit", 0, np.arange(n * count), k)).view(n, count, k)
            labels = torch.full((count,), y)
            best = torch.cat([self.among(net, some, labels[: some.shape[1]])[1] for some in z.split(250, 1)])
            root = net.arch["spread"] * unpack(net.roots[y].float(), net.places, k)
            codes = best @ root.T
            covariance = 0.5 * codes.T.cov() + 0.5 * root @ root.T
            other.class_means[y] = net.class_means[y] + codes.mean(0)
            other.roots[y] = pack(torch.linalg.cholesky(covariance.double()), net.places)
        other.arch["spread"] = 1.0
        return other


def chosen(study: Study, net: LinearGenerator, settings: dict[str, Any], size: int) -> Iterator[Row]:
    """Rows of what teachers choose among draws of ``net``."""
    chooser = Chooser(study, study.args.teachers)
    for n in (3, 8):
        yield Row("best", {**settings, "of": n}, size, partial(chooser.drawn, net, n), True)
        yield Row("refit", {**settings, "of": n}, size, partial(study.drawn, chooser.refit(net, n)), True)


def rows(study: Study) -> Iterator[Row]:
    """Real images, the grid, its variations at ``--also``, and the real images that fit the same bytes."""
    a = study.args
    yield Row("real", {}, None, study.real, True)
    fits = {sketches: study.fit(sketches) for sketches in ((1, 2) if a.vary else (1,))}
    limit = len(fits[1].variance)
    components = sorted({min(k, limit) for k in a.components})
    grid: list[tuple[int, float, dict[str, Any]]] = [(k, s, {}) for k, s in product(components, a.spreads)]
    if a.vary:
        varied: list[dict[str, Any]] = [{"alpha": 0.0}, {"shrink_means": False}, {"dtype": "float16"}, {"sketches": 2}]
        grid += [(k, s, v) for v, (k, s) in product(varied, a.also)]
    sizes = dict[int, str]()
    for k, spread, variation in grid:
        options = {name: value for name, value in variation.items() if name != "sketches"}
        source = fits[variation.get("sketches", 1)]
        net = source.generator(k, channels=study.channels, size=study.size, spread=spread, **options)
        size = len(save(net.state_dict()))
        sizes.setdefault(size, f"{k} {net.arch['dtype']}")
        settings = {"components": k, "spread": spread, **variation}
        yield Row("gaussian", settings, size, partial(study.drawn, net), not variation and [k, spread] in a.also)
        if a.teachers and not variation and [k, spread] in a.also:
            yield from chosen(study, net, settings, size)
    for size, of in sizes.items():
        sets = [study.within(size, student) for student in study.students]
        settings = {"as_many_bytes_as": of, "images_a_class": [len(s[0][0]) for s in sets]}
        yield Row("equal_bytes", settings, max(b for _, b in sets), partial(study.fixed, size), True)


class Trained:
    """The students of a row, and what they were found to know."""

    def __init__(self, study: Study, row: Row, split: str = "val") -> None:
        start = time.perf_counter()
        self.study, self.row, self.found = study, row, dict[str, list[float]]()
        self.nets = [study.train(row, student) for student in study.students]
        self.measure(split)
        self.seconds = time.perf_counter() - start

    def measure(self, split: str) -> None:
        self.found[split] = [self.study.accuracy(net, split) for net in self.nets]

    def line(self) -> dict[str, Any]:
        """What is printed."""
        a = self.study.args
        return {
            "benchmark": "gaussian",
            "data": self.study.manifest.name,
            "row": self.row.name,
            "settings": self.row.settings,
            **{split: accuracies(values) for split, values in self.found.items()},
            "bytes": self.row.bytes,
            "seconds": round(self.seconds, 1),
            "protocol": {
                "student": a.student,
                "steps": a.steps,
                "batch": a.batch,
                "precision": a.precision,
                "test_every": a.every,
                "first": a.first,
            },
            "machine": machine(),
            "versions": versions("torch", "numpy"),
        }


def accuracies(values: list[float]) -> dict[str, Any]:
    return {
        "mean": round(float(np.mean(values)), 2),
        "std": round(float(np.std(values, ddof=1)), 2),
        "of_students": [round(v, 2) for v in values],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="shards")
    parser.add_argument("--components", type=int, nargs="+", default=[64, 128, 256, 384])
    parser.add_argument("--spreads", type=float, nargs="+", default=[0.7, 0.8, 0.9, 1.0])
    parser.add_argument("--students", type=int, default=3, help="of each row, 2 or more (default %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="number of the first, to go on with others (default 0)")
    parser.add_argument("--student", default="convnet:32", help="architecture (default %(default)s)")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--precision", choices=("float32", "bf16"), default="float32")
    parser.add_argument("--every", type=int, default=2, help="which images of test are measured (default each 2nd)")
    parser.add_argument("--no-flip", dest="flip", action="store_false", help="for digits")
    parser.add_argument(
        "--also",
        type=json.loads,
        default=[[256, 1.0], [256, 0.8]],
        help="[[components, spread], …]: measured on test too",
    )
    parser.add_argument("--teachers", type=Path, help="directory of a finished teachers step: rows of what they choose")
    parser.add_argument("--vary", action="store_true", help="at --also other shrinkage, precision and fits, too")
    args = parser.parse_args()
    study, done = Study(args), list[Trained]()
    for row in rows(study):
        done.append(Trained(study, row))
        print(json.dumps(done[-1].line()), flush=True)
    plain = [t for t in done if t.row.name == "gaussian" and t.row.settings.keys() == {"components", "spread"}]
    chosen = max(plain, key=lambda t: float(np.mean(t.found["val"])))
    for trained in done:
        if trained.row.test or trained is chosen:
            trained.measure("test")
            print(json.dumps(trained.line() | {"chosen_on_val": trained is chosen}), flush=True)


if __name__ == "__main__":
    main()
