"""DDP behind the small engine interface, like DeepSpeed. An engine does the backward pass and the optimizer step.

Losses are independent of engines: the gradient of a loss with respect to the *images* is computed outside the engine
(`Adversaries.generator_backward`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gdd_dist.engines.nonfinite import all_finite, poisoned, step_if
from gdd_dist.engines.precision import autocast
from gdd_dist.models.files import cpu_state
from gdd_dist.runtime.teams import Team
from gdd_dist.runtime.world import World


class DDPEngine:
    """torch's DDP over the world, or over a team; the bare network when there is one rank. ``example``: inputs of the right shapes.

    DDP reorders its buckets after its first backward pass, and gloo then sums in another order. With three or more ranks, a resumed run
    would therefore differ from an uninterrupted one in its last bits. Two backward passes with a loss of zero before the first step
    fix the order for both.
    ``loss_scale``: whether fp16 scales the loss.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        world: World | Team,
        precision: str,
        example: tuple[Tensor, ...],
        accumulate: int = 1,
        loss_scale: bool = True,
    ) -> None:
        self.module, self._optimizer, self._precision, self._device = module, optimizer, precision, world.device
        self.accumulate, self._done = accumulate, 0
        self._scaler = torch.amp.GradScaler(world.device.type, enabled=loss_scale and precision == "fp16")
        self._wrapped: nn.Module | None = module
        if world.size > 1:
            devices = [world.device.index] if world.device.type == "cuda" else None
            # Only buffers of batch normalization change; others, such as a generator's linear part, are equal on all ranks.
            changing = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.modules())
            self._wrapped = DistributedDataParallel(
                module, device_ids=devices, process_group=world.group, broadcast_buffers=changing
            )
            module.eval()  # otherwise batch normalization would update its statistics
            for _ in range(2):  # the buckets are reordered when the second forward begins
                (self._forward(*example).sum() * 0).backward()
            module.train()
            self._optimizer.zero_grad(set_to_none=True)

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Forward under autocast; float32 out. Only the last micro-batch of a step reduces gradients over ranks."""
        waits = self._done < self.accumulate - 1 and isinstance(self._wrapped, DistributedDataParallel)
        with self._wrapped.no_sync() if waits else contextlib.nullcontext():  # type: ignore[union-attr, operator]
            return self._forward(*inputs)

    def _forward(self, *inputs: Tensor) -> Tensor:
        assert self._wrapped is not None
        with autocast(self._device, self._precision):
            out: Tensor = self._wrapped(*inputs)
        return out.float()

    def backward(self, loss: Tensor) -> None:
        """Compute gradients, as means over ranks and micro-batches."""
        loss = poisoned(loss)
        self._scaler.scale(loss / self.accumulate if self.accumulate > 1 else loss).backward()
        self._done += 1

    def step(self, lr: float) -> Tensor:
        """Step, then clear gradients. fp16 also skips steps while it searches for its loss scale; these are not faults."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        moved = all_finite(self.module.parameters())  # gradients are means over ranks, so all ranks agree
        if self._scaler.is_enabled():
            scale = self._scaler._get_scale_async()  # get_scale() would wait for the device
            assert scale is not None  # set by the backward pass
            moved = moved | (scale > 1)
            self._scaler.step(self._optimizer)
            self._scaler.update()
        else:
            step_if(moved, self._optimizer)
        self._optimizer.zero_grad(set_to_none=True)
        self._done = 0
        return moved

    def gathered(self) -> contextlib.AbstractContextManager[Sequence[Tensor]]:
        """Yield the weights, which are complete on every rank."""
        return contextlib.nullcontext(list(self.module.parameters()))

    def weights(self) -> dict[str, Tensor]:
        """Return copies on the CPU."""
        return cpu_state(self.module)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of network, optimizer and loss scale."""
        return {
            "module": self.weights(),
            "optimizer": self._optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the result of ``state_dict``."""
        self.module.load_state_dict(state["module"])
        fused = {"fused": self._optimizer.defaults["fused"]}  # this run's choice, not that of the saved state
        groups = [{**group, **fused} for group in state["optimizer"]["param_groups"]]
        self._optimizer.load_state_dict({**state["optimizer"], "param_groups": groups})
        # A fused step needs moments in the same memory format as their weight.
        for weight, kept in self._optimizer.state.items():
            for name, value in kept.items():
                if value.shape == weight.shape and value.stride() != weight.stride():
                    kept[name] = torch.empty_like(weight).copy_(value)
        self._scaler.load_state_dict(state["scaler"])

    def close(self) -> None:
        """Delete the wrapper, because its reducer keeps the process group alive."""
        self._wrapped = None
