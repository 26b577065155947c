"""--engine: which engine carries a network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gdd_dist import deepspeed_config
from gdd_dist.context import Context
from gdd_dist.deepspeed_engine import DeepSpeedEngine
from gdd_dist.engines import DDPEngine, Engine


def build_engine(ctx: Context, net: nn.Module, optimizer: torch.optim.Adam, example: tuple[Tensor, ...]) -> Engine:
    """The engine that this run's settings ask for. ``example``: inputs of the right shapes."""
    config = ctx.config
    if config.engine == "ddp":
        return DDPEngine(net, optimizer, ctx.world, ctx.precision, example, config.accumulate)
    given = deepspeed_config.read(config.deepspeed_config)
    return DeepSpeedEngine(net, optimizer, ctx.world, ctx.precision, example, given, config.accumulate)
