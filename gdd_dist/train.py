"""The program that runs all steps in order: torchrun --nproc_per_node=8 -m gdd_dist.train."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from gdd_dist.config import command_line as configuration
from gdd_dist.runtime.process_identity import place
from gdd_dist.runtime.run_program import note_preemption, run_program
from gdd_dist.runtime.signals import asked

if TYPE_CHECKING:
    from gdd_dist.runtime.world import World


def main(argv: list[str], joined: Callable[[World], None]) -> None:
    """Run, or estimate with --dry-run, what the command line requests."""
    asked.among_ranks = not {"--print_config", "--print-config"} & set(argv)
    command = configuration.parse(argv)
    config = command.config
    if command.print_config:
        if place()[0] == 0:
            sys.stdout.write(configuration.to_yaml(config, command.preset))
        return
    from gdd_dist.runtime.world import World  # imported here, because it loads torch, which --help must not wait for

    world = World(config.device, config.timeout, config.deterministic)
    joined(world)
    if command.dry_run:
        from gdd_dist.dry_run import table

        table.show(world, config)
        return
    from gdd_dist.pipeline.dataset import prepare_data
    from gdd_dist.pipeline.run import run, run_lock

    out = Path(config.out or ".")
    with run_lock(world, out):
        note_preemption(world, out)
        begin = time.monotonic()
        data, status = prepare_data(world, config, out)
        run(world, config, command.preset, data, out, (status, time.monotonic() - begin))


if __name__ == "__main__":
    run_program(main, sys.argv[1:])
