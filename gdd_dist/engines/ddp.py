"""DDP behind the small interface that steps use; DeepSpeed stands behind the same one. An engine owns backward and step.

Losses know no engine: the gradient of a loss with respect to the *images* is taken outside (`Adversaries.generator_backward`).
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

    DDP changes the order of its buckets after its first backward. gloo then sums in another order, so from three ranks on a resumed
    run would differ in its last bits from an undisturbed one. Two backwards with a loss of zero, before the first step, settle the
    order for both.
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
            # Only a batch norm's buffers change; others, as a generator's linear part, are alike on all ranks and stay so.
            changing = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.modules())
            self._wrapped = DistributedDataParallel(
                module, device_ids=devices, process_group=world.group, broadcast_buffers=changing
            )
            module.eval()  # or a batch norm would note what it sees
            for _ in range(2):  # the buckets are ordered as the second forward begins
                (self._forward(*example).sum() * 0).backward()
            module.train()
            self._optimizer.zero_grad(set_to_none=True)

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Forward under autocast; float32 out. Gradients of all micro-batches but a step's last stay on this rank."""
        waits = self._done < self.accumulate - 1 and isinstance(self._wrapped, DistributedDataParallel)
        with self._wrapped.no_sync() if waits else contextlib.nullcontext():  # type: ignore[union-attr, operator]
            return self._forward(*inputs)

    def _forward(self, *inputs: Tensor) -> Tensor:
        assert self._wrapped is not None
        with autocast(self._device, self._precision):
            out: Tensor = self._wrapped(*inputs)
        return out.float()

    def backward(self, loss: Tensor) -> None:
        """Mean gradients over ranks and micro-batches."""
        loss = poisoned(loss)
        self._scaler.scale(loss / self.accumulate if self.accumulate > 1 else loss).backward()
        self._done += 1

    def step(self, lr: float) -> Tensor:
        """Step, then clear gradients. A loss scale that is still being sought skips steps too; that is no fault."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        moved = all_finite(self.module.parameters())  # means over ranks: all find the same
        if self._scaler.is_enabled():
            scale = self._scaler._get_scale_async()  # get_scale() would wait
            assert scale is not None  # there was a backward
            moved = moved | (scale > 1)
            self._scaler.step(self._optimizer)
            self._scaler.update()
        else:
            step_if(moved, self._optimizer)
        self._optimizer.zero_grad(set_to_none=True)
        self._done = 0
        return moved

    def gathered(self) -> contextlib.AbstractContextManager[Sequence[Tensor]]:
        """The weights as they are."""
        return contextlib.nullcontext(list(self.module.parameters()))

    def weights(self) -> dict[str, Tensor]:
        """Copies on the CPU."""
        return cpu_state(self.module)

    def state_dict(self) -> dict[str, Any]:
        """Network, optimizer, loss scale."""
        return {
            "module": self.module.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What ``state_dict`` gave."""
        self.module.load_state_dict(state["module"])
        fused = {"fused": self._optimizer.defaults["fused"]}  # ours, whatever wrote the state
        groups = [{**group, **fused} for group in state["optimizer"]["param_groups"]]
        self._optimizer.load_state_dict({**state["optimizer"], "param_groups": groups})
        # A fused step wants moments that lie in memory as their weight does.
        for weight, kept in self._optimizer.state.items():
            for name, value in kept.items():
                if value.shape == weight.shape and value.stride() != weight.stride():
                    kept[name] = torch.empty_like(weight).copy_(value)
        self._scaler.load_state_dict(state["scaler"])

    def close(self) -> None:
        """Drop the wrapper, whose reducer holds the process group."""
        self._wrapped = None
