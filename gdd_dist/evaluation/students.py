"""Trains the report's students, one at a time on one rank. Every random number is a function of (report seed, purpose, place).

Purposes do not contain what a row trains on, so all rows of one student seed have the same initial weights, order, latents and
augmentation, and differ only in images and labels.
Shapes: n images, K classes, H W. A place is a position in the sequence of all images that a student sees; a set has IPC images per class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gdd_dist.data.augment import AUGMENT_DRAWS
from gdd_dist.data.images import prefetch, to_float
from gdd_dist.data.noise import permutation, uniform
from gdd_dist.data.order import Recent, dealt
from gdd_dist.evaluation import confusion
from gdd_dist.evaluation.confusion import StudentResult
from gdd_dist.evaluation.kinds import GENERATORS
from gdd_dist.evaluation.rows import Job, Row, full_order, step_bounds
from gdd_dist.models.classifiers import Classifier
from gdd_dist.models.files import GENERATOR, load_generator_network, read_teachers
from gdd_dist.models.generator import ImageGenerator
from gdd_dist.runtime.monitor import Monitor
from gdd_dist.training.classifier_fit import predict, student_step
from gdd_dist.training.condense import condensed
from gdd_dist.training.context import Context
from gdd_dist.training.drawing import draw
from gdd_dist.training.skipped_steps import Diverged, Skips
from gdd_dist.training.soft_labels import chosen, soft_labels
from sharding.errors import UserError

CHUNK_IMAGES = 512
"""Images that are drawn, augmented and labelled together, before the steps that train on them; one step at a time would be slow."""

Fetch = Callable[[np.ndarray, int], Tensor]
"""``fetch(slots, n)`` returns the n-th draw for each slot, uint8 [len(slots), C, H, W]."""
Draw = Callable[[int, str, int, int], np.ndarray]


class Frozen:
    """The networks from which students learn, loaded on first use and shared by this rank's students."""

    def __init__(self, ctx: Context, dirs: Mapping[str, Path]) -> None:
        self._ctx, self._dirs = ctx, dirs
        self._generators: dict[str, ImageGenerator] = {}

    def generator(self, train_on: str) -> ImageGenerator:
        """Return the generator of rows that train on ``train_on``, in evaluation mode."""
        if train_on not in self._generators:
            net, _ = load_generator_network(self._dirs[GENERATORS[train_on]] / GENERATOR)
            self._generators[train_on] = self._ctx.watch(net).eval().requires_grad_(False)
        return self._generators[train_on]

    @cached_property
    def equal_bytes(self) -> int:
        """Number of stored real images per class that take as many bytes as the matched generator's file; at least one."""
        shards = self._ctx.images("train").shards
        size = (self._dirs["matching"] / GENERATOR).stat().st_size
        return max(1, int(size * shards.samples / shards.payload_bytes) // self._ctx.classes)

    @cached_property
    def teachers(self) -> list[Classifier]:
        """The last snapshot of each teacher training."""
        return [self._ctx.teacher(t) for t in read_teachers(self._dirs["teachers"]) if t.last]

    def soft_labels(self, images: Tensor, temperature: float) -> Tensor:
        """Return the teachers' soft labels, float32 [n, K], of float images [n, C, H, W]."""
        return soft_labels(self.teachers, images, temperature, self._ctx.precision)

    def chosen(self, draws: Tensor, labels: np.ndarray) -> Tensor:
        """Return the image that the teachers choose for each of n ``labels``, from draws uint8 [m, n, C, H, W]."""
        return chosen(self.teachers, draws, torch.from_numpy(labels).to(self._ctx.device), self._ctx.precision)


def real_samples(
    seed: int, purpose: str, slots: np.ndarray, ipc: int, members: list[np.ndarray], draw: Draw = permutation
) -> np.ndarray:
    """Return sample numbers of real images for slots of a sequence of sets; a sample repeats only after all others of its class.

    Slot s is image s mod (IPC·K) of set s div (IPC·K), sets ordered by class. ``members``: sample numbers by class;
    ``draw``: `permutation`, or a `Recent` of it.
    """
    sets, places = np.divmod(slots, ipc * len(members))
    turns = sets * ipc + places % ipc
    out = np.empty(len(slots), dtype=np.int64)
    for c in np.unique(places // ipc):
        here = places // ipc == c
        out[here] = members[c][dealt(seed, f"{purpose}/real/{c}", turns[here], len(members[c]), draw)]
    return out


class Sets:
    """The images that a row's student sees: sets of IPC images per class, a new one in each epoch (regenerate) or only one (fixed).

    ``take(places)`` returns uint8 images [n, C, H, W] and labels int64 [n] in the order of training.
    """

    def __init__(self, ctx: Context, frozen: Frozen, row: Row, seed: int) -> None:
        assert row.ipc is not None
        self._ctx, self._frozen, self._ipc, self._fixed = ctx, frozen, row.ipc, row.protocol == "fixed"
        self._same = self._fixed and not row.augmented
        self._seed, self.purpose = ctx.config.step_seed("report"), f"report/{row.protocol}/{row.ipc}/{seed}"
        self.images = row.ipc * ctx.classes
        """Number of images in a set."""
        self._order = Recent(2 * self.images)  # chunks of the training sequence end within an epoch
        if row.train_on in GENERATORS:
            self._drawn = self._generated(frozen.generator(row.train_on))
        else:
            self._drawn = self._real(frozen.equal_bytes if row.train_on == "equal_bytes" else None)
        self._select, self._condense, self._train_on = row.select, row.condense, row.train_on

    def _real(self, most: int | None) -> Fetch:
        """Return the fetch of real images: from all of a class, or from a fixed draw of at most ``most`` of them."""
        images = self._ctx.images("train")
        members = [np.flatnonzero(images.labels == c) for c in range(self._ctx.classes)]
        if most is not None:
            purpose = f"{self.purpose}/equal_bytes"
            members = [m[permutation(self._seed, purpose, c, len(m))[:most]] for c, m in enumerate(members)]
        recent = Recent(2 * len(images))

        def fetch(slots: np.ndarray, n: int) -> Tensor:
            purpose = f"{self.purpose}/{n}" if n else self.purpose
            return images.read(real_samples(self._seed, purpose, slots, self._ipc, members, recent))

        return fetch

    def _generated(self, generator: ImageGenerator) -> Fetch:
        def fetch(slots: np.ndarray, n: int) -> Tensor:
            return draw(self._ctx, generator, self._labels(slots), self._seed, self.purpose, n, slots=slots)

        return fetch

    def _labels(self, slots: np.ndarray) -> np.ndarray:
        return slots % self.images // self._ipc

    def _fetch(self, slots: np.ndarray) -> Tensor:
        """Return the images at slots of the sequence of sets: one draw each, or the teachers' choice from several."""
        if self._select == 1:
            return self._drawn(slots, 0)
        draws = torch.stack([self._drawn(slots, n) for n in range(self._select)])
        return self._frozen.chosen(draws, self._labels(slots))

    def _condensed(self) -> Tensor:
        """The fixed set after the teachers moved its latents."""
        frozen, generator = self._frozen, self._frozen.generator(self._train_on)
        return condensed(self._ctx, generator, frozen.teachers, self._ipc, self._seed, self.purpose, self._condense)

    @cached_property
    def only(self) -> tuple[Tensor, np.ndarray]:
        """The set of the fixed protocol, ordered by class: uint8 images [IPC·K, C, H, W] on the device, labels int64."""
        slots = np.arange(self.images)
        images = self._condensed() if self._condense else self._fetch(slots)
        return images.to(self._ctx.device).contiguous(), slots // self._ipc

    @cached_property
    def _only_soft_labels(self) -> Tensor:
        """The teachers' soft labels of the unaugmented fixed set, float32 [IPC·K, K]."""
        return self._label(to_float(self.only[0], self._ctx.device))

    def _label(self, images: Tensor) -> Tensor:
        return self._frozen.soft_labels(images, self._ctx.config.report.label_temperature)

    def soft_labels(self, places: np.ndarray, seen: Tensor) -> Tensor:
        """Return the teachers' soft labels, float32 [n, K], of images ``seen`` at places, float; computed once if epochs are equal."""
        if not self._same:
            return self._label(seen)
        return self._only_soft_labels[torch.from_numpy(self._members(places)).to(seen.device)]

    def _members(self, places: np.ndarray) -> np.ndarray:
        """Return the index within its set of the image at each place, int64 [n]; every epoch is shuffled differently."""
        return dealt(self._seed, f"{self.purpose}/order", places, self.images, self._order)

    def take(self, places: np.ndarray) -> tuple[Tensor, np.ndarray]:
        """Return images and labels at places of the training sequence."""
        members = self._members(places)
        if self._fixed:
            images, labels = self.only
            return images[torch.from_numpy(members).to(images.device)], labels[members]
        return self._fetch(places // self.images * self.images + members), members // self._ipc


def train(ctx: Context, frozen: Frozen, job: Job) -> tuple[StudentResult, np.ndarray]:
    """Train one student from initial weights. Returns its result and its confusion matrix on test, int64 [K, K]."""
    seed = ctx.config.step_seed("report")
    net = ctx.classifier(job.row.student, seed, f"report/{job.row.student}/{job.seed}")
    monitor = ctx.passing(f"report: {job.row.student} on {job.row.train_on}", job.budget.optimizer_steps)
    try:
        if job.row.ipc is None:
            distinct = _fit_full(ctx, net, job, monitor)
        else:
            distinct = job.budget.distinct_images_seen
            if job.row.train_on == "equal_bytes":
                distinct = min(distinct, frozen.equal_bytes * ctx.classes)
            _fit_sets(ctx, net, frozen, job, monitor)
    except Diverged as e:
        lr = "--report.full_lr" if job.row.ipc is None else "--report.lr"
        raise UserError(f"report: of {job.row.student}, trained on {job.row.train_on}, {e}; lower {lr}") from e
    monitor.close()
    test = ctx.images("test")
    answers = predict(net, test.read, len(test), ctx.device, ctx.precision).argmax(1).numpy()
    matrix = confusion.confusion(test.labels, answers, ctx.classes)
    return StudentResult(confusion.accuracy(matrix), confusion.balanced(matrix), distinct), matrix


def _fit_sets(ctx: Context, net: Classifier, frozen: Frozen, job: Job, monitor: Monitor) -> None:
    r, seed = ctx.config.report, ctx.config.step_seed("report")
    sets, skips = Sets(ctx, frozen, job.row, job.seed), Skips()
    step = student_step(ctx, net, r.lr)
    bounds = step_bounds(sets.images, job.budget.batch, job.budget.epochs)
    steps = max(1, CHUNK_IMAGES // job.budget.batch)
    for first in range(0, len(bounds) - 1, steps):
        ctx.world.check_stop()
        ends = bounds[first : first + steps + 1]
        places = np.arange(ends[0], ends[-1])
        images, labels = sets.take(places)
        draws = torch.from_numpy(uniform(seed, f"{sets.purpose}/augment", 0, places, AUGMENT_DRAWS))
        images, y, draws = ctx.sent((images, torch.from_numpy(labels), draws))
        x = to_float(images, ctx.device)
        if job.row.augmented:
            x = ctx.augment(x, draws)
        if job.row.labels == "soft":
            y = sets.soft_labels(places, x)
        for a, b in pairwise((ends - ends[0]).tolist()):
            skips.note(step(x[a:b], y[a:b]))
        monitor.advance(first + len(ends) - 1)
    skips.settle()


def _fit_full(ctx: Context, net: Classifier, job: Job, monitor: Monitor) -> int:
    """Train on all of train; returns the number of images that were seen at least once."""
    r, images = ctx.config.report, ctx.images("train")
    order = full_order(ctx.config, images.shards.shard_samples, job.seed)
    take = student_step(ctx, net, r.full_lr)
    seen, skips = np.zeros(len(images), dtype=bool), Skips()
    images.expect(order.batch, 0, job.budget.optimizer_steps)

    def read(step: int) -> tuple[Tensor, ...]:
        indices = order.batch(step)
        seen[indices] = True
        draws = uniform(order.seed, f"{order.purpose}/augment", step, np.arange(len(indices)), AUGMENT_DRAWS)
        return ctx.sent((images.read(indices), torch.from_numpy(images.labels[indices]), torch.from_numpy(draws)))

    steps = prefetch(read, 0, job.budget.optimizer_steps, ctx.config.loader.prefetch)
    for step, (batch, labels, draws) in enumerate(steps):
        ctx.world.check_stop()
        x = ctx.augment(to_float(batch, ctx.device), draws)
        skips.note(take(x, labels))
        monitor.advance(step + 1)
    skips.settle()
    return int(seen.sum())
