"""fp16: a loss that overflows moves nothing and lowers the scale; the next step moves."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from gpu_phases import Line, Task
from gpu_phases.bench import SMALL, Bench

SOUGHT = 16
"""Steps at most until the scale is low enough."""


def find(task: Task) -> Iterator[Line]:
    """One line; raises where a step did what it should not."""
    bench = Bench(task.out / "data", task.out / "skip", task.device, [*SMALL, "--precision", "fp16"])
    with bench.trainee("gan") as trainee:
        engine = trainee.nets.g
        z = torch.ones(4, trainee.nets.generator.latent, device=bench.ctx.device)
        labels = torch.arange(4, device=bench.ctx.device)

        def step(factor: float) -> tuple[bool, bool, float]:
            """(what the engine says, whether a weight moved, the scale after it)."""
            before = [p.detach().clone() for p in engine.module.parameters()]
            engine.backward(engine(z, labels).square().mean() * factor)
            said = bool(engine.step(1e-3))
            moved = any(not torch.equal(a, b) for a, b in zip(before, engine.module.parameters(), strict=True))
            return said, moved, float(engine.state_dict()["scaler"]["scale"])

        def until_it_moves() -> tuple[bool, bool, float]:
            """The scale begins high, and the first steps may have to lower it."""
            for _ in range(SOUGHT):
                if (found := step(1.0))[1]:
                    break
            return found

        first, overflowed, after = until_it_moves(), step(float("inf")), until_it_moves()
    yield {"first": first, "overflowed": overflowed, "after": after}
    assert first[1], "no step moves"
    assert not overflowed[1], "a step that overflowed moved a weight"
    assert overflowed[2] < first[2], "a step that overflowed did not lower the scale"
    assert after[1], "no step after it moves"
