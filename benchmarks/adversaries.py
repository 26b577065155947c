"""What an adversary adds to the terms that move the Gaussians, at equal CPU seconds, judged by students of two budgets.

    python benchmarks/adversaries.py runs/0 runs/1 runs/2 [--seconds 120] [--weight 0.1] > benchmarks/results/adversaries.jsonl

From the Gaussians of each run, with its teachers: the label and the feature term alone (`none`), and beside them, by ``--weight``,

- discriminator: the trainer's own, with gradient penalties, as the step gan left it;
- heads: small convolutions on the teachers' maps, conditional on the class, hinge loss, no penalty (projected GANs, Sauer et al. 2021);
- drift: in the teachers' features each image is attracted by real ones of its class and repelled by its own group (drifting, arXiv
  2602.04770), float32;
- and each of the three without label and feature (`… alone`).

Every row moves for as many CPU seconds of this process as ``--seconds`` says, on one thread: its first steps tell how many steps that is.
Rows of real images and of the Gaussians before stand beside them. A JSON line for each run, row and budget, as benchmarks/terms.py.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import terms
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gdd_dist.config.command_line import settings_of
from gdd_dist.config.steps import Inputs
from gdd_dist.data.images import to_float
from gdd_dist.dry_run.trial import SILENT
from gdd_dist.engines.precision import autocast
from gdd_dist.models.classifiers import Halve
from gdd_dist.models.gaussian import LinearGenerator
from gdd_dist.pipeline.finished_run import opened
from gdd_dist.steps.matching import Matching, Pool
from gdd_dist.steps.matching_groups import Groups
from gdd_dist.training.context import Context

WARM, TIMED = 2, 8
"""Steps before the first is timed, and steps that are."""
HEAD_WIDTH, HEAD_LR = 64, 2e-4
NEAR = (0.05, 0.2)
"""Temperatures of the drift, as shares of the mean distance."""
Maps = Sequence[Tensor]
"""What a teacher makes of images after each of its stages, [n, c, h, w] of one batch."""


class Adversary(nn.Module):
    """``forward(teacher, fake, real, labels, group)`` → the term, a scalar, of maps of generated and real images with the same labels."""

    def forward(self, teacher: int, fake: Maps, real: Maps, labels: Tensor, group: int) -> Tensor:
        raise NotImplementedError


class Head(nn.Module):
    """[n, c, h, w], labels [n] → scores [n, h·w]."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, HEAD_WIDTH, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(HEAD_WIDTH, HEAD_WIDTH, 3, padding=1),
            nn.LeakyReLU(0.2),
        )
        self.out, self.of_class = nn.Conv2d(HEAD_WIDTH, 1, 1), nn.Embedding(classes, HEAD_WIDTH)
        nn.init.normal_(self.of_class.weight, std=HEAD_WIDTH**-0.5)

    def forward(self, maps: Tensor, labels: Tensor) -> Tensor:
        h = self.body(maps / maps.detach().std().clamp(min=1e-6))
        return (self.out(h) + (h * self.of_class(labels)[:, :, None, None]).sum(1, keepdim=True)).flatten(1)


class Heads(Adversary):
    """A head for each teacher and stage, trained by the hinge loss before the generator sees it."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self._classes, self._heads = classes, nn.ModuleDict()
        self._adam: dict[int, torch.optim.Adam] = {}

    def forward(self, teacher: int, fake: Maps, real: Maps, labels: Tensor, group: int) -> Tensor:
        if str(teacher) not in self._heads:
            self._heads[str(teacher)] = nn.ModuleList(Head(m.shape[1], self._classes) for m in fake)
            self._adam[teacher] = torch.optim.Adam(
                self._heads[str(teacher)].parameters(), lr=HEAD_LR, betas=(0.0, 0.99)
            )
        heads: Any = self._heads[str(teacher)]
        heads.requires_grad_(True)
        loss = sum(
            F.relu(1 - head(r, labels)).mean() + F.relu(1 + head(f.detach(), labels)).mean()
            for head, f, r in zip(heads, fake, real, strict=True)
        )
        with torch.enable_grad():
            self._adam[teacher].zero_grad()
            loss.backward()  # type: ignore[union-attr]
            self._adam[teacher].step()
        heads.requires_grad_(False)
        return -torch.stack([head(f, labels).mean() for head, f in zip(heads, fake, strict=True)]).mean()


class Drift(Adversary):
    """Means and deviations of each map, moved within each group."""

    def forward(self, teacher: int, fake: Maps, real: Maps, labels: Tensor, group: int) -> Tensor:
        found = []
        for f, r in zip(fake, real, strict=True):
            of_fake, of_real = (torch.cat((m.mean((2, 3)), m.flatten(2).std(2)), 1).split(group) for m in (f, r))
            found += [drift(a, b) for a, b in zip(of_fake, of_real, strict=True)]
        return torch.stack(found).mean()


def drift(fake: Tensor, real: Tensor) -> Tensor:
    """The squared distance of ``fake`` [n, s] from where the field of ``real`` [m, s] and of itself would move it (arXiv 2602.04770)."""
    with torch.no_grad():
        old, n = fake.detach(), len(fake)
        targets = torch.cat((old, real))
        distances = torch.cdist(old, targets)
        unit = distances.mean() / old.shape[1] ** 0.5
        near = distances / distances.mean()
        near[:, :n] += 100 * torch.eye(n)  # an image does not repel itself
        old, targets, force = old / unit, targets / unit, torch.zeros_like(old)
        for temperature in NEAR:
            logits = -near / temperature
            weight = (logits.softmax(1) * logits.softmax(0)).clamp(min=1e-12).sqrt()
            of_fake, of_real = weight[:, :n], weight[:, n:]
            field = torch.cat((-of_fake * of_real.sum(1, True), of_real * of_fake.sum(1, True)), 1)
            moved = field @ targets - field.sum(1, True) * old
            force += moved / moved.square().mean().clamp(min=1e-8).sqrt()
        goal = old + force
    return (fake / unit - goal).square().mean()


class Judged(Pool):
    """A pool that adds an adversary's term to the distance of features. It reads the real images of the groups itself."""

    def __init__(self, ctx: Context, inputs: Inputs, adversary: Adversary, weight: float) -> None:
        super().__init__(ctx, inputs.directories["teachers"], inputs.directories["logits"])
        self._adversary, self._weight, self._train = adversary, weight, ctx.images("train")

    def answer(
        self, images: Tensor, labels: Tensor, groups: Groups, draws: Tensor, plain: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """As the pool's, with the adversary's term in the second place."""
        ctx = self._ctx
        with maps_of(self._nets) as fake:
            logits, apart = super().answer(images, labels, groups, draws, plain)
        real_images = to_float(self._train.read(groups.samples), ctx.device)
        seen = torch.where(plain[:, None, None, None], real_images, ctx.augment(real_images, draws))
        term, first = images.new_zeros(()), 0
        for teacher, count in groups.runs():
            here = slice(first, first + count)
            with torch.no_grad(), maps_of(self._nets) as real, autocast(ctx.device, ctx.precision):
                self._nets[teacher](seen[here])
            of_both = ([m.float() for m in side[teacher]] for side in (fake, real))
            term = term + self._adversary(teacher, *of_both, labels[here], groups.size) * (count / len(images))
            first += count
        return logits, self._weight * term + (0.0 if apart is None else apart)


@contextmanager
def maps_of(nets: dict[int, Any]) -> Iterator[dict[int, list[Tensor]]]:
    """By teacher, what its stages give until the end of the block, which forwards each teacher once."""
    found: dict[int, list[Tensor]] = {teacher: [] for teacher in nets}
    hooks = [
        layer.register_forward_hook(lambda _, __, out, kept=found[teacher]: kept.append(out))
        for teacher, net in nets.items()
        for layer in net.modules()
        if isinstance(layer, Halve)
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


ADVERSARIES: dict[str, Callable[[int], Adversary] | None] = {
    "none": None,
    "discriminator": None,
    "heads": Heads,
    "drift": lambda classes: Drift(),
}
ROWS = [*ADVERSARIES, *(f"{name} alone" for name in ADVERSARIES if name != "none")]


def trainee(out: Path, row: str, weight: float, steps: int, work: Path, given: list[str]) -> Matching:
    """The Gaussians of a run before their first step, with the adversary of this row."""
    name, _, alone = row.partition(" ")
    kept = 0.0 if alone else 1.0
    weights = {
        "pair": 0.0,
        "mean": 0.0,
        "label": 0.05 * kept,
        "feature": 1.0,
        "adv": weight * (name == "discriminator"),
    }
    if alone and name == "discriminator":
        weights["feature"] = 0.0
    argv = [f"--matching.lambda_{term}={value}" for term, value in weights.items()]
    config = settings_of(out, *given, *argv, "--matching.start=gaussian", f"--matching.steps={steps}")
    ctx, fps, dirs = opened(out, config, terms.STEPS, lambda world: None)
    torch.set_num_threads(1)  # so that seconds of the process are seconds of a core
    inputs, make = Inputs(dirs, fps, {}), ADVERSARIES[name]
    pool = Judged(ctx, inputs, make(ctx.classes), weight) if make else Pool(ctx, dirs["teachers"], dirs["logits"])
    if not alone:
        pool.look()
    made = Matching(ctx, work, pool, inputs)
    made.monitor = SILENT
    return made


def moved(out: Path, row: str, args: argparse.Namespace, given: list[str]) -> tuple[LinearGenerator, dict[str, Any]]:
    """The Gaussians of ``out`` after as many steps as fit ``--seconds`` of CPU time, and what that took."""
    with tempfile.TemporaryDirectory() as folder:
        probe = trainee(out, row, args.weight, 10_000, Path(folder), given)
        train(probe, 0, WARM)
        each = train(probe, WARM, WARM + TIMED) / TIMED
        probe.close()
    steps = max(1, round(args.seconds / each))
    with tempfile.TemporaryDirectory() as folder:
        made = trainee(out, row, args.weight, steps, Path(folder), given)
        seconds = train(made, 0, steps)
        net: LinearGenerator = made.nets.ema.folded()  # type: ignore[operator]
        made.close()
    return net, {"steps": steps, "cpu_seconds": round(seconds, 1)}


def train(made: Matching, first: int, end: int) -> float:
    """Steps ``first`` to ``end``; the CPU seconds they took."""
    begin = time.process_time()
    for step in range(first, end):
        made.train(step, made.read(step))
    return time.process_time() - begin


def main() -> None:
    parser = terms.parser(__doc__ or "")
    parser.add_argument(
        "--seconds", type=float, default=120.0, help="of CPU time that a row moves (default %(default)s)"
    )
    parser.add_argument("--weight", type=float, default=0.1, help="of an adversary's term (default %(default)s)")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS, help="default: all")
    args, given = parser.parse_known_args()
    for out in args.runs:
        of, about = terms.studies(args, out), {"benchmark": "adversaries", "run": out.name}
        for row, net in terms.before(out):
            terms.judge(of, row, net, {}, about)
        for row in args.rows:
            net, cost = moved(out, row, args, given)
            terms.judge(of, row, net, {"weight": args.weight, **cost}, about)


if __name__ == "__main__":
    main()
