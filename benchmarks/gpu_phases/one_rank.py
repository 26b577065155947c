"""A process group of one rank, NCCL on a GPU, and DDP around both networks: the losses of the bare networks."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from types import SimpleNamespace

import torch
import torch.distributed as dist

from gdd_dist.engines.ddp import DDPEngine
from gdd_dist.runtime.groups import Vote, mean_over_ranks
from gpu_phases import Line, Task
from gpu_phases.agreement import losses
from gpu_phases.bench import SMALL, Bench

FIRST = 5


def find(task: Task) -> Iterator[Line]:
    """One line; raises where the wrapped networks have other losses."""
    bench = Bench(task.out / "data", task.out / "one-rank", task.device, [*SMALL, "--precision", "float32"])
    device = bench.ctx.device
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    with bench.trainee("gan") as trainee:
        bare = [losses(trainee, "gan", i) for i in range(FIRST)]
    with bench.trainee("gan") as trainee:
        nets, ranks = (
            trainee.nets,
            SimpleNamespace(device=device, size=2, group=None),
        )  # 2, so that it wraps: the group has one
        shape = (1, bench.ctx.manifest.channels, bench.ctx.manifest.height, bench.ctx.manifest.height)
        label = torch.zeros(1, dtype=torch.int64, device=device)
        for name, example in (
            ("g", torch.zeros(1, nets.generator.latent, device=device)),
            ("d", torch.zeros(shape, device=device)),
        ):
            engine = getattr(nets, name)
            adam = copy.copy(engine._optimizer)
            setattr(nets, name, DDPEngine(engine.module, adam, ranks, "float32", (example, label)))
        wrapped = [losses(trainee, "gan", i) for i in range(FIRST)]
    means = mean_over_ranks({"one": torch.ones((), device=device)}, 2)  # one rank's sum, halved
    vote = Vote(0, 7, 2).result()
    off = float((torch.tensor(bare) - torch.tensor(wrapped)).abs().max())
    yield {"backend": backend, "bare": bare, "wrapped": wrapped, "off": off, "mean": means, "vote": vote}
    dist.destroy_process_group()
    assert off < 1e-4, "DDP changes the losses"
    assert means == {"one": 0.5}
    assert vote == (False, 7)
