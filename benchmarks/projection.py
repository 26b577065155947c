"""What a step of gan or matching computes and sends, by formula, and what that comes to on hardware that is assumed.

Pure functions. ``benchmarks/scaling.py`` checks `sent_by_a_rank` against bytes that the kernel counted; the tables of docs/scaling.md
are `tables()`. Work is counted on the real networks, on torch's meta device, where nothing is computed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from gdd_dist.models.classifiers import build_classifier
from gdd_dist.models.discriminator import Discriminator
from gdd_dist.models.generator import Generator
from gdd_dist.training import losses
from gdd_dist.training.adversaries import image_gradient

GRADIENT = 4
"""Bytes of a gradient on its way: float32, whatever the precision of the forward."""
VOTE = 16
"""Bytes of the one all-reduce beside the gradients': two int64, whether to stop and whether to save."""
FIRST_BUCKET, BUCKET = 2**20, 25 * 2**20
"""DDP's default buckets, in bytes: one all-reduce each."""


def parameters(net: nn.Module) -> int:
    """Trained numbers of a network."""
    return sum(p.numel() for p in net.parameters())


def payload(generator: int, discriminator: int) -> int:
    """Bytes that a rank gives to all-reduces in a step of gan or matching under DDP, from the networks' parameters.

    Scalars, 20 to 32 bytes at the first 20 steps and each 20th, are left out.
    """
    return GRADIENT * (generator + discriminator) + VOTE


def sent_by_a_rank(payload: float, ranks: int) -> float:
    """Bytes that each of N ranks sends in a ring all-reduce, 2 (N - 1) / N times the payload (Patarasuk and Yuan 2009)."""
    return 2 * (ranks - 1) / ranks * payload


def buckets(numbers: int) -> int:
    """All-reduces in which DDP sends the gradients of a network."""
    return 1 + math.ceil(max(0, GRADIENT * numbers - FIRST_BUCKET) / BUCKET)


@dataclass(frozen=True)
class Work:
    """Of one step: floating-point operations an image, and torch operations, which are as many for any batch."""

    flops: float
    operations: int


class Counter(TorchDispatchMode):
    """Counts torch operations, and floating-point operations of convolutions and matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.operations, self.flops = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.operations += 1
        if func._overloadpacket == torch.ops.aten.convolution_backward:
            self.flops += _of_backward(*args)
        elif (formula := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        return out


def _of_backward(gradient: Tensor, images: Tensor, weight: Tensor, *rest: Any) -> int:
    """Of a convolution's gradients by images and by weights. torch's own formula forgets that groups cut the latter."""
    wanted: Sequence[bool] = rest[-1]
    several = (
        images if rest[4] else gradient
    )  # a transposed convolution gives each of its numbers to several, others gather them
    one = 2 * several.numel() * weight[0].numel()
    return one * sum(wanted[:2])


def step_work(generator: Generator, discriminator: Discriminator, teacher: nn.Module | None = None) -> Work:
    """Work of a gan step, or of a matching step with one ``teacher``; networks on the meta device.

    Augmentation, optimizer and the running mean are left out. The order of things is that of gan_step and
    matching_step.
    """
    n, arch = 2, generator.arch
    with torch.device("meta"), Counter() as counter:
        labels, real = torch.zeros(n, dtype=torch.int64), torch.zeros(n, arch["channels"], arch["size"], arch["size"])
        images = generator(torch.zeros(n, generator.latent), labels)
        _discriminator_step(discriminator, real, images.detach(), labels)
        if teacher is None:  # the gan draws anew for the generator's step
            images = generator(torch.zeros(n, generator.latent), labels)

        def loss(x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            with torch.no_grad():
                of_real = discriminator(real, labels)
            value = losses.relativistic_generator(of_real, discriminator(x, labels))
            pair = [] if teacher is None else [losses.skd(torch.zeros(n, arch["classes"]), teacher(x), 2.0)]
            return sum(pair, value), {}

        _, _, gradient = image_gradient(loss, images)
        (images * gradient).sum().backward()
    return Work(counter.flops / n, counter.operations)


def _discriminator_step(discriminator: Discriminator, real: Tensor, fake: Tensor, labels: Tensor) -> None:
    images = torch.cat((real, fake)).requires_grad_()
    scores = discriminator(images, torch.cat((labels, labels)))
    (gradients,) = torch.autograd.grad(scores.sum(), images, create_graph=True)
    penalties = sum(map(losses.zero_centred_penalty, gradients.chunk(2)))
    (losses.relativistic_discriminator(*scores.chunk(2)) + penalties).backward()


@dataclass(frozen=True)
class Hardware:
    """Assumed, not measured. Rates in operations or bytes a second, times in seconds."""

    peak: float = 989e12  # H100 SXM, bf16 without sparsity, data sheet
    utilisation: float = 0.1
    operation: float = 8e-6  # of host time; no step is faster than all of them one after the other
    host: int = 8
    inside: float = 225e9  # half of NVLink's 450 GB/s in one direction
    across: float = 200e9  # half of eight 400 Gb/s ports a host
    hop: float = 15e-6


def compute_seconds(work: Work, share: int, hardware: Hardware) -> float:
    """A step of ``share`` images on one GPU: bound by arithmetic, or by the host that starts its operations."""
    return max(work.flops * share / (hardware.peak * hardware.utilisation), work.operations * hardware.operation)


def reduce_seconds(payload: float, calls: int, ranks: int, hardware: Hardware) -> float:
    """All-reduces of ``payload`` bytes in ``calls`` calls over N GPUs, none hidden behind compute.

    Bytes of a ring over the slowest link; hops of a ring or of a tree, whichever has fewer, as NCCL chooses.
    """
    if ranks == 1:
        return 0.0
    bandwidth = hardware.inside if ranks <= hardware.host else hardware.across
    hops = 2 * min(ranks - 1, math.ceil(math.log2(ranks)))
    return sent_by_a_rank(payload, ranks) / bandwidth + calls * hops * hardware.hop


@dataclass(frozen=True)
class Case:
    """ImageNet-1k at one size, both networks and one teacher on the meta device."""

    size: int
    width: int = 512
    classes: int = 1000
    teacher: str = "resnet18"

    def networks(self) -> tuple[Generator, Discriminator, nn.Module]:
        """As the trainer builds them: two blocks a stage."""
        shape: dict[str, Any] = {"classes": self.classes, "channels": 3, "size": self.size}
        wide: dict[str, Any] = {**shape, "width": self.width, "blocks": 2}
        with torch.device("meta"):
            teacher = build_classifier(self.teacher, **shape, mean=[0.0] * 3, std=[1.0] * 3)
            return Generator(**wide), Discriminator(**wide), teacher.eval().requires_grad_(False)


GPUS = (8, 64, 512, 4096)
SHARE, BATCH = 16, 4096
"""Images of a GPU where the batch grows with the GPUs; images of all where it does not."""


def tables(hardware: Hardware | None = None) -> str:
    """The tables of docs/scaling.md, Markdown."""
    return "\n".join(line for size in (64, 128) for line in _of_size(Case(size), hardware or Hardware()))


def _of_size(case: Case, hardware: Hardware) -> Iterator[str]:
    generator, discriminator, teacher = case.networks()
    sizes = parameters(generator), parameters(discriminator)
    works = {"gan": step_work(generator, discriminator), "matching": step_work(generator, discriminator, teacher)}
    calls = 1 + sum(map(buckets, sizes))
    counted = "; ".join(
        f"{s}: {w.flops / 1e9:.0f} GFLOP an image, {w.operations:,} operations" for s, w in works.items()
    )
    yield f"**{case.size} pixels.** Generator {sizes[0]:,} and discriminator {sizes[1]:,} weights of width {case.width}:"
    yield f"{payload(*sizes) / 1e6:.1f} MB in {calls} all-reduces a step. By step, {counted}."
    yield ""
    names = [f"{step}: {column}" for step in works for column in ("compute", "communication", "images/s", "efficiency")]
    yield "| GPUs | batch | images a GPU | sent by a GPU | " + " | ".join(names) + " |"
    yield "|" + "---|" * (4 + len(names))
    for grows in (True, False):
        at_first: dict[str, float] = {}
        for gpus in GPUS:
            share = SHARE if grows else BATCH // gpus
            cells = [
                f"{gpus:,}",
                f"{share * gpus:,}",
                f"{share:,}",
                f"{sent_by_a_rank(payload(*sizes), gpus) / 1e6:.0f} MB",
            ]
            waits = reduce_seconds(payload(*sizes), calls, gpus, hardware)
            for step, work in works.items():
                computes = compute_seconds(work, share, hardware)
                rate = share * gpus / (computes + waits)
                efficiency = rate / gpus / at_first.setdefault(step, rate / gpus)
                cells += [f"{1e3 * computes:.1f} ms", f"{1e3 * waits:.1f} ms", f"{rate:,.0f}", f"{efficiency:.0%}"]
            yield "| " + " | ".join(cells) + " |"
    yield ""
