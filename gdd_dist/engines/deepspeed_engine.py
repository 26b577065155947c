"""DeepSpeed's ZeRO stages 0 to 3 behind the engine interface: one ``deepspeed.initialize`` per network, float32 weights.

This file works around silent errors of DeepSpeed: it clips gradients by default; its own forward does not support a second
derivative, so forwards use the bare module; ZeRO 3 frees weights after the first backward pass of a forward, so they are
gathered for a second one; its optimizer state does not exist before the first step, so an engine begins with a step that
changes nothing. Saved states are complete and in torch's own layout, so any engine on any number of ranks can load them.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gdd_dist.engines.loss_scale import LossScale
from gdd_dist.engines.nonfinite import poisoned
from gdd_dist.engines.precision import autocast
from gdd_dist.models.files import cpu_state
from gdd_dist.runtime.devices import backend
from gdd_dist.runtime.world import World
from sharding.errors import UserError

ALIGNED = 1024
BUCKET = 25 * 2**20 // 4
"""Float32 numbers in a gradient bucket, as many as in torch's DDP (25 MiB)."""
MOMENTS = ("exp_avg", "exp_avg_sq")


def import_deepspeed(device: torch.device) -> Any:
    """Import deepspeed for this device's accelerator. Raises UserError when it is missing or set to another accelerator."""
    wanted = "cpu" if device.type == "cpu" else "cuda"
    if os.environ.setdefault("DS_ACCELERATOR", wanted) != wanted:
        raise UserError(
            f"DS_ACCELERATOR is {os.environ['DS_ACCELERATOR']} but this run computes on {wanted}; unset it, or give --device"
        )
    try:
        import deepspeed
    except ImportError as e:
        raise UserError(
            f"--engine deepspeed cannot import deepspeed ({e}); pip install deepspeed ninja, or use --engine ddp"
        ) from e
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module=r"torch\.distributed"
    )  # torch's warnings about DeepSpeed
    # Shared-memory collectives are only for inference, and would be compiled when the process group is created.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def engine_config(given: Mapping[str, Any], numel: int, accumulate: int) -> dict[str, Any]:
    """Return the configuration for one network of ``numel`` weights, from the user's file.

    DeepSpeed's default bucket of 500 million numbers would hold all gradients, which ZeRO 2 and 3 are meant to avoid. So buckets are
    as large as DDP's, but not larger than the network (rounded up for NCCL's alignment). ZeRO 3 does not overlap communication with
    the backward pass, because this is untested on a GPU together with a second backward pass.
    """
    bucket = min(BUCKET, -(-numel // ALIGNED) * ALIGNED)
    asked = given.get("zero_optimization", {})
    zero = {
        "stage": 1,
        "memory_efficient_linear": False,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        **({"overlap_comm": False} if asked.get("stage") == 3 else {}),
        **asked,
    }
    return {
        **given,
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed does not use it: our losses are already means
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": 0.0,  # the default would be 1.0
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


class DeepSpeedEngine:
    """One network and its Adam under ZeRO. ``given``: the checked --deepspeed-config; ``example``: inputs of the right shapes."""

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        world: World,
        precision: str,
        example: tuple[Tensor, ...],
        given: Mapping[str, Any],
        accumulate: int = 1,
    ) -> None:
        deepspeed = import_deepspeed(world.device)
        if not dist.is_initialized():  # a single process without a launcher
            os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed requires it
            dist.init_process_group(backend(world.device), store=dist.HashStore(), rank=0, world_size=1)
        self.module, self._world, self._precision = module, world, precision
        self._parameters: list[Any] = list(module.parameters())  # DeepSpeed adds attributes to them
        self._shapes = [p.shape for p in self._parameters]  # ZeRO 3 removes the shapes of the parameters
        numel = sum(p.numel() for p in self._parameters)
        self._defaults = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        config = engine_config(given, numel, accumulate)
        self._stage = int(config["zero_optimization"]["stage"])
        self._engine, self._optimizer, _, _ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
        self._scale = LossScale(enabled=precision == "fp16")
        self._accumulate, self._done, self._went_back = accumulate, 0, False
        if self._scale.enabled:
            for p in self._parameters:
                p.register_hook(self._scale.unscale)
        self._step_of_nothing(example)

    @property
    def _inner(self) -> torch.optim.Optimizer:
        """Return torch's optimizer, which has flat partitions from stage 1 on."""
        inner: torch.optim.Optimizer = (
            getattr(self._optimizer, "optimizer", self._optimizer) if self._stage else self._optimizer
        )
        return inner

    def _step_of_nothing(self, example: tuple[Tensor, ...]) -> None:
        """Create the optimizer's state, all zero, without changing a weight."""
        for _ in range(self._accumulate):
            self.backward(self(*example).sum() * 0)
        self.step(0.0)
        self._set_steps(0.0)

    def _set_steps(self, value: float) -> None:
        for state in self._inner.state.values():
            state["step"].fill_(value)

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Forward under autocast; float32 out."""
        with autocast(self._world.device, self._precision):
            out: Tensor = self.module(*inputs)
        self._went_back = False
        if self._stage == 3 and out.requires_grad:
            out.register_hook(self._note_backward)
        return out.float()

    def _note_backward(self, gradient: Tensor) -> None:
        self._went_back = True

    def backward(self, loss: Tensor) -> None:
        """Compute gradients, as means over ranks and micro-batches."""
        if self._done:
            self._engine.step()  # ends the previous micro-batch; ``step`` ends the last one
        # DeepSpeed's own forward would do this. Without it, ZeRO 3 keeps only the last micro-batch.
        getattr(self._optimizer, "clear_backward_seen_flag", lambda: None)()
        with self.gathered() if self._went_back else nullcontext():
            self._engine.backward(self._scale.scale(poisoned(loss)))
        self._done += 1

    def step(self, lr: float) -> Tensor:
        """Step, then clear gradients. From stage 1 on DeepSpeed itself skips a step whose gradients are not finite on any rank.

        fp16 also skips steps while it searches for its loss scale; these are not faults.
        """
        sought = self._scale.sought
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        if not self._stage:
            self._scale.drop_overflow(self._parameters)
        self._engine.step()
        if self._stage:
            self._scale.overflow = bool(self._optimizer.overflow)
        moved = not self._scale.overflow
        self._scale.update()
        self._done = 0
        return torch.tensor(moved or sought)  # no extra wait, because DeepSpeed has already waited for the device

    def gathered(self) -> AbstractContextManager[Sequence[Tensor]]:
        """Yield all weights, complete, for reading inside the context. All ranks enter it."""
        return self._gathered(None) if self._stage == 3 else nullcontext(self._parameters)

    @contextmanager
    def _gathered(self, modifier: int | None) -> Iterator[Sequence[Tensor]]:
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters(self._parameters, modifier_rank=modifier):
            yield self._parameters

    def weights(self) -> dict[str, Tensor]:
        """Return complete weights and buffers on the CPU. All ranks call it."""
        with self.gathered():
            return cpu_state(self.module)

    def state_dict(self) -> dict[str, Any]:
        """Return network, optimizer and loss scale in DDPEngine's layout. All ranks call it; it is complete only on rank 0."""
        state = {i: self._moments(i) for i in range(len(self._parameters))}
        groups = [{**d, "params": list(state)} for d in self._defaults]
        optimizer = {"state": state if self._world.is_main else {}, "param_groups": groups}
        return {"module": self.weights(), "optimizer": optimizer, "scaler": self._scale.state_dict()}

    def _moments(self, i: int) -> dict[str, Tensor]:
        """Return the complete optimizer state of weight ``i`` on the CPU."""
        from deepspeed.utils import safe_get_full_optimizer_state

        parameter, inner = self._parameters[i], self._inner.state
        found: dict[str, Tensor] = {"step": torch.tensor(max(float(s["step"]) for s in inner.values()))}
        for key in MOMENTS:
            whole = safe_get_full_optimizer_state(parameter, key) if self._stage else inner[parameter][key]
            found[key] = whole.detach().cpu().view(self._shapes[i]).clone()
        return found

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load rank 0's result of ``state_dict``, or DDPEngine's. All ranks call it with the same state."""
        with self._gathered(0) if self._stage == 3 else nullcontext(), torch.no_grad():
            self.module.load_state_dict(state["module"])
        if self._stage:
            self._optimizer.refresh_fp32_params()
        moments = state["optimizer"]["state"]  # empty if DDP saved it before the first step
        for i, shape in enumerate(self._shapes):
            for key in MOMENTS:
                whole = moments[i][key] if moments else torch.zeros(shape)
                self._set_moment(self._parameters[i], key, whole.to(self._world.device, torch.float32))
        self._set_steps(float(moments[0]["step"]) if moments else 0.0)
        self._scale.load_state_dict(state["scaler"])

    def _set_moment(self, parameter: Any, key: str, whole: Tensor) -> None:
        """Set this rank's part of a weight's optimizer state."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if self._stage == 0:
            self._inner.state[parameter][key].copy_(whole)
        elif self._stage < 3:
            safe_set_full_optimizer_state(parameter, whole, key)
        else:  # DeepSpeed's own setter fails on a padded last part
            n = parameter.ds_tensor.numel()
            part = whole.flatten()[self._world.rank * n : (self._world.rank + 1) * n]
            safe_set_local_optimizer_state(parameter, nn.functional.pad(part, (0, n - len(part))), key)

    def close(self) -> None:
        """Remove the hooks that keep the process group alive."""
        self._engine.destroy()
