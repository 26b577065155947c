"""--engine: builds the engine that trains a network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gdd_dist.config.settings import Config
from gdd_dist.engines import deepspeed_config
from gdd_dist.engines.ddp import DDPEngine
from gdd_dist.engines.deepspeed_engine import DeepSpeedEngine
from gdd_dist.engines.interface import Engine
from gdd_dist.runtime.world import World


def build_engine(
    config: Config,
    world: World,
    precision: str,
    net: nn.Module,
    optimizer: torch.optim.Adam,
    example: tuple[Tensor, ...],
) -> Engine:
    """Return the engine chosen by the settings. ``example``: inputs of the right shapes."""
    if config.engine == "ddp":
        return DDPEngine(net, optimizer, world, precision, example, config.accumulate)
    given = deepspeed_config.read(config.deepspeed_config)
    return DeepSpeedEngine(net, optimizer, world, precision, example, given, config.accumulate)
