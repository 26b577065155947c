"""Step time of the gan's networks under DDP and each ZeRO stage: same work, one run, engines in turn, one JSON line a stage.

    torchrun --nproc_per_node=2 benchmarks/engines.py [--width 64] [--size 32] [--batch 8] [--steps 3] [--rounds 3] [--precision float32]

``ours``: images a second under that ZeRO stage, ``other``: under DDP, the median over rounds; ``ratio``: ZeRO's over DDP's. What a stage
keeps and needs in memory is measured by memory.py.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
import torch
from common import line
from torch import Tensor

from gdd_dist.engines.ddp import DDPEngine
from gdd_dist.engines.deepspeed_engine import DeepSpeedEngine
from gdd_dist.engines.interface import Engine
from gdd_dist.models.discriminator import Discriminator
from gdd_dist.models.generator import Generator
from gdd_dist.runtime.world import World
from gdd_dist.training import losses
from gdd_dist.training.adversaries import image_gradient

KINDS = ("ddp", "zero_0", "zero_1", "zero_2", "zero_3")


def build(net: Generator | Discriminator, world: World, kind: str, precision: str, bucket: int = 0) -> Engine:
    """A network on one of KINDS, with Adam. ``bucket``: numbers in DeepSpeed's buckets, 0 for the trainer's choice."""
    label = torch.zeros(1, dtype=torch.int64, device=world.device)
    size, channels = net.arch["size"], net.arch["channels"]
    latent, image = label.new_zeros(1, 64).float(), label.new_zeros(1, channels, size, size).float()
    example = (latent if isinstance(net, Generator) else image, label)
    adam = torch.optim.Adam(net.parameters(), betas=(0.0, 0.99))
    if kind == "ddp":
        return DDPEngine(net, adam, world, precision, example)
    buckets = {"reduce_bucket_size": bucket, "allgather_bucket_size": bucket} if bucket else {}
    zero = {"stage": int(kind[-1]), "stage3_param_persistence_threshold": 0, **buckets}
    return DeepSpeedEngine(net, adam, world, precision, example, {"zero_optimization": zero})


def step(g: Engine, d: Engine, world: World, batch: int, size: int) -> None:
    """A discriminator step with gradient penalties and a generator step."""
    labels = torch.arange(batch, device=world.device) % 10
    real = torch.randn(batch, 3, size, size, device=world.device)
    with torch.no_grad():
        fake = g.module(torch.randn(batch, 64, device=world.device), labels).float()
    both = torch.cat((real, fake)).requires_grad_()
    scores = d(both, torch.cat((labels, labels)))
    (of_images,) = torch.autograd.grad(scores.sum(), both, create_graph=True)
    loss = losses.relativistic_discriminator(*scores.chunk(2))
    loss = loss + 0.5 * sum(map(losses.zero_centred_penalty, of_images.chunk(2)))
    d.backward(loss)
    d.step(1e-4)
    images = g(torch.randn(batch, 64, device=world.device), labels)

    def of_generator(x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            scores = d.module(real, labels)
        return losses.relativistic_generator(scores.float(), d.module(x, labels).float()), {}

    _, _, gradient = image_gradient(of_generator, images)
    g.backward((images * gradient).sum())
    g.step(1e-4)


def seconds_a_step(kind: str, world: World, options: argparse.Namespace) -> float:
    """Of networks and engines that are made and closed here."""
    shape = {"classes": 10, "channels": 3, "size": options.size, "width": options.width}
    torch.manual_seed(0)
    nets = Generator(**shape).to(world.device), Discriminator(**shape).to(world.device)
    g, d = (build(net, world, kind, options.precision) for net in nets)
    step(g, d, world, options.batch, options.size)
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
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("width", 64), ("size", 32), ("batch", 8), ("steps", 3), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--precision", default="float32")
    options = parser.parse_args()
    world = World().join()
    rates: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(options.rounds):
        for kind in KINDS:  # in turn, so that other jobs on this machine burden all alike
            rates[kind].append(options.batch * world.size / seconds_a_step(kind, world, options))
    if world.is_main:
        settings = {**vars(options), "ranks": world.size, "device": world.device.type}
        for kind in KINDS[1:]:
            text = line(f"engines/{kind}", np.array(rates[kind]), {"ddp": np.array(rates["ddp"])}, "images/s", settings)
            print(json.dumps(text), flush=True)
    world.close()


if __name__ == "__main__":
    main()
