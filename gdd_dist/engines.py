"""DDP behind the small interface that steps use; DeepSpeed stands behind the same one. An engine owns backward and step.

Losses know no engine: the gradient of a loss with respect to the *images* is taken outside (``image_gradient``), then sent
back through the generator's engine with ``engine.backward((images * gradient).sum())``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gdd_dist.distributed import World
from gdd_dist.finite import all_finite, poisoned

if TYPE_CHECKING:  # who only reads a generator has no TensorBoard
    from gdd_dist.teams import Team


class Engine(Protocol):
    """One network with its optimizer on all ranks. Gradients are means over ranks, and over the micro-batches of a step.

    A step is as many pairs of forward and ``backward`` as the engine was made for (``accumulate``), then ``step``.
    """

    module: nn.Module

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Forward for a backward to come."""

    def backward(self, loss: Tensor) -> None:
        """Gradients of a scalar loss, reduced over ranks."""

    def step(self, lr: float) -> bool:
        """One optimizer step at this learning rate; clears gradients. False, on all ranks, when it was skipped: a gradient was not finite."""

    def gathered(self) -> contextlib.AbstractContextManager[Sequence[Tensor]]:
        """All weights in the network's order, whole, to be read inside the context. All ranks enter it."""

    def weights(self) -> dict[str, Tensor]:
        """Whole weights and buffers on the CPU. All ranks call it."""

    def state_dict(self) -> dict[str, Any]:
        """Network and optimizer, for a checkpoint that any engine on any number of ranks can load; whole on rank 0. All ranks call it."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What an engine's ``state_dict`` gave on rank 0. All ranks call it."""

    def close(self) -> None:
        """Free what holds on to the process group."""


class DDPEngine:
    """torch's DDP over the world, or over a team; the bare network when there is one rank. ``example``: inputs of the right shapes.

    DDP orders its buckets anew after its first backward, gloo then sums in another order, and from three ranks on a resumed
    run would differ in its last bits from an undisturbed one: backwards of nothing, first of all, settle the order for both.
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
            self._wrapped = DistributedDataParallel(module, device_ids=devices, process_group=world.group)
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

    def step(self, lr: float) -> bool:
        """Step, then clear gradients. A loss scale that is still being sought skips steps too; that is no fault."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        scaled = self._scaler.is_enabled() and self._scaler.get_scale() > 1
        finite = all_finite(self.module.parameters())  # means over ranks: all find the same
        if finite or self._scaler.is_enabled():
            self._scaler.step(self._optimizer)
            self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        self._done = 0
        return finite or scaled

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
        self._optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])

    def close(self) -> None:
        """Drop the wrapper, whose reducer holds the process group."""
        self._wrapped = None


def cpu_state(net: nn.Module) -> dict[str, Tensor]:
    """Weights and buffers, contiguous copies on the CPU."""
    return {k: v.detach().cpu().contiguous().clone() for k, v in net.state_dict().items()}


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """Autocast over float32 weights: bf16, fp16, or nothing for float32."""
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if precision == "bf16" else torch.float16)


def resolve_precision(precision: str, device: torch.device) -> str:
    """``auto`` → bf16 where the hardware computes in it, else float32."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() else "float32"


def image_gradient(loss: Callable[[Tensor], Tensor], images: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, d loss / d images), both detached, of a scalar loss of float images [B, C, H, W]; no weight gets a gradient."""
    leaf = images.detach().requires_grad_()
    value = loss(leaf)
    (gradient,) = torch.autograd.grad(poisoned(value), leaf)
    return value.detach(), gradient.detach()
