"""Step time and memory of a GAN step under DDP and each ZeRO stage: same work, one run, engines in turn, one JSON line each.

torchrun --nproc_per_node=2 benchmarks/engines.py [--width 256] [--size 32] [--batch 16] [--rounds 5]

``ours``: images per second under DDP; ``other``: under that ZeRO stage; ``ratio``: DDP over ZeRO. ``settings`` holds the bytes that a rank keeps
for weights, gradients and optimizer (counted tensors of networks and optimizers after a step), by engine.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import sys
import time
from typing import Any

import torch
from torch import Tensor

from gdd_dist import losses
from gdd_dist.deepspeed_engine import DeepSpeedEngine
from gdd_dist.distributed import World
from gdd_dist.engines import DDPEngine, Engine, image_gradient
from gdd_dist.metrics import versions
from gdd_dist.models.discriminator import Discriminator
from gdd_dist.models.generator import Generator

KINDS: tuple[Any, ...] = ("ddp", 0, 1, 2, 3)


def engines(kind: Any, world: World, options: argparse.Namespace) -> tuple[Engine, Engine]:
    """Generator and discriminator on one kind of engine."""
    shape = {"classes": 10, "channels": 3, "size": options.size, "width": options.width}
    torch.manual_seed(0)
    nets = Generator(**shape).to(world.device), Discriminator(**shape).to(world.device)
    label = torch.zeros(1, dtype=torch.int64, device=world.device)
    image = torch.zeros(1, 3, options.size, options.size, device=world.device)
    examples = (torch.zeros(1, 64, device=world.device), label), (image, label)
    given = {"zero_optimization": {"stage": kind, "stage3_param_persistence_threshold": 0}}
    made: list[Engine] = []
    for net, example in zip(nets, examples, strict=True):
        adam = torch.optim.Adam(net.parameters(), betas=(0.0, 0.99))
        if kind == "ddp":
            made.append(DDPEngine(net, adam, world, options.precision, example))
        else:
            made.append(DeepSpeedEngine(net, adam, world, options.precision, example, given))
    return made[0], made[1]


def step(g: Engine, d: Engine, world: World, batch: int, size: int) -> float:
    """A discriminator step with gradient penalties and a generator step; returns the discriminator's loss."""
    labels = torch.arange(batch, device=world.device) % 10
    real = torch.randn(batch, 3, size, size, device=world.device).requires_grad_()
    with torch.no_grad():
        fake = g.module(torch.randn(batch, 64, device=world.device), labels).float()
    fake.requires_grad_()
    a, b = d(real, labels), d(fake, labels)
    of_images = torch.autograd.grad([a.sum() + b.sum()], [real, fake], create_graph=True)
    loss = losses.relativistic_discriminator(a, b) + 0.5 * sum(map(losses.zero_centred_penalty, of_images))
    d.backward(loss)
    d.step(1e-4)
    images = g(torch.randn(batch, 64, device=world.device), labels)

    def of_generator(x: Tensor) -> Tensor:
        with torch.no_grad():
            scores = d.module(real, labels)
        return losses.relativistic_generator(scores.float(), d.module(x, labels).float())

    _, gradient = image_gradient(of_generator, images)
    g.backward((images * gradient).sum())
    g.step(1e-4)
    return float(loss.detach())


def held() -> int:
    """Bytes of all tensors that this process holds, each storage once."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if isinstance(o, torch.Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def measure(kind: Any, world: World, options: argparse.Namespace) -> tuple[float, int]:
    """(seconds a step, bytes held after it) of one engine, made and closed here."""
    before = held()
    g, d = engines(kind, world, options)
    step(g, d, world, options.batch, options.size)
    kept = held() - before
    world.barrier()
    begin = time.perf_counter()
    for _ in range(options.steps):
        step(g, d, world, options.batch, options.size)
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    world.barrier()
    seconds = (time.perf_counter() - begin) / options.steps
    g.close()
    d.close()
    return seconds, kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("width", 64), ("size", 32), ("batch", 8), ("steps", 3), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--precision", default="float32")
    options = parser.parse_args()
    world = World()
    seconds: dict[Any, list[float]] = {kind: [] for kind in KINDS}
    kept: dict[Any, int] = {}
    for _ in range(options.rounds):
        for kind in KINDS:  # in turn, so that other jobs on this machine burden all alike
            spent, bytes_held = measure(kind, world, options)
            seconds[kind].append(spent)
            kept[kind] = max(world.gather(bytes_held))
    if world.is_main:
        images = options.batch * world.size
        rate = {kind: images / statistics.median(s) for kind, s in seconds.items()}
        for kind in KINDS[1:]:
            line = {
                "benchmark": "engines",
                "ours": rate["ddp"],
                "other": {f"zero_{kind}": rate[kind]},
                "unit": "images/s",
                "ratio": rate["ddp"] / rate[kind],
                "settings": {
                    **vars(options),
                    "ranks": world.size,
                    "device": world.device.type,
                    "bytes_held_a_rank": {"ddp": kept["ddp"], f"zero_{kind}": kept[kind]},
                },
                "machine": platform.processor() or platform.machine(),
                "versions": versions(),
            }
            sys.stdout.write(json.dumps(line) + "\n")
    world.close()


if __name__ == "__main__":
    main()
