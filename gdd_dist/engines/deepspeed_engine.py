"""DeepSpeed's ZeRO stages 0 to 3 behind the engine interface: one ``deepspeed.initialize`` per network, float32 weights.

What DeepSpeed gets silently wrong is kept out here: it clips gradients unless told not to; its own forward knows no double
backward, so forwards go through the bare module; ZeRO 3 takes weights away after a first backward of a forward, so they are
gathered for a second one; its optimizer state does not exist before the first step, so an engine
begins with a step of nothing. States that leave this file are whole, in torch's own layout: any engine on any number of
ranks can go on from them.
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
"""Float32 numbers in a bucket of torch's DDP, 25 MiB."""
MOMENTS = ("exp_avg", "exp_avg_sq")


def import_deepspeed(device: torch.device) -> Any:
    """The deepspeed package, told which accelerator to use. Raises UserError where it is missing or told another."""
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
    )  # torch's words to DeepSpeed
    # Shared-memory collectives serve inference alone, and would be compiled as the process group is joined.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def engine_config(given: Mapping[str, Any], numel: int, accumulate: int) -> dict[str, Any]:
    """The configuration of one network of ``numel`` weights, from what the user's file says.

    Buckets, by default 500 million numbers whatever the network, are as large as DDP's, and no larger than the network (rounded up:
    NCCL's alignment). A bucket of the network's size would hold all the gradients that ZeRO 2 and 3 are there not to keep.
    ZeRO 3 reduces gradients in the order of the backward, not beside it: beside a second backward nobody has tried it on a GPU.
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
        "train_micro_batch_size_per_gpu": 1,  # a mere number to DeepSpeed: our losses are means already
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": 0.0,  # 1.0 unless said
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
        if not dist.is_initialized():  # one process alone, without a launcher
            os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it
            dist.init_process_group(backend(world.device), store=dist.HashStore(), rank=0, world_size=1)
        self.module, self._world, self._precision = module, world, precision
        self._parameters: list[Any] = list(module.parameters())  # DeepSpeed adds attributes to them
        self._shapes = [p.shape for p in self._parameters]  # under ZeRO 3 theirs are gone
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
        """torch's optimizer, over flat partitions from stage 1 on."""
        inner: torch.optim.Optimizer = (
            getattr(self._optimizer, "optimizer", self._optimizer) if self._stage else self._optimizer
        )
        return inner

    def _step_of_nothing(self, example: tuple[Tensor, ...]) -> None:
        """Make the optimizer's state, all zero, without moving a weight."""
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
        """Mean gradients over ranks and micro-batches."""
        if self._done:
            self._engine.step()  # tells DeepSpeed of the micro-batch before; the last one's is told by ``step``
        # What DeepSpeed's own forward would do: without it ZeRO 3 forgets all micro-batches but the last.
        getattr(self._optimizer, "clear_backward_seen_flag", lambda: None)()
        with self.gathered() if self._went_back else nullcontext():
            self._engine.backward(self._scale.scale(poisoned(loss)))
        self._done += 1

    def step(self, lr: float) -> Tensor:
        """Step, then clear gradients. From stage 1 on DeepSpeed itself skips a step whose gradients are not finite on any rank.

        A loss scale that is still being sought skips steps too; that is no fault.
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
        return torch.tensor(moved or sought)  # DeepSpeed has waited for the device already

    def gathered(self) -> AbstractContextManager[Sequence[Tensor]]:
        """All weights, whole, to be read inside the context. All ranks enter it."""
        return self._gathered(None) if self._stage == 3 else nullcontext(self._parameters)

    @contextmanager
    def _gathered(self, modifier: int | None) -> Iterator[Sequence[Tensor]]:
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters(self._parameters, modifier_rank=modifier):
            yield self._parameters

    def weights(self) -> dict[str, Tensor]:
        """Whole weights and buffers on the CPU. All ranks call it."""
        with self.gathered():
            return cpu_state(self.module)

    def state_dict(self) -> dict[str, Any]:
        """Network, optimizer, loss scale in the layout of DDPEngine. All ranks call it; whole on rank 0, less on the others."""
        state = {i: self._moments(i) for i in range(len(self._parameters))}
        groups = [{**d, "params": list(state)} for d in self._defaults]
        optimizer = {"state": state if self._world.is_main else {}, "param_groups": groups}
        return {"module": self.weights(), "optimizer": optimizer, "scaler": self._scale.state_dict()}

    def _moments(self, i: int) -> dict[str, Tensor]:
        """Whole optimizer state of weight ``i`` on the CPU."""
        from deepspeed.utils import safe_get_full_optimizer_state

        parameter, inner = self._parameters[i], self._inner.state
        found: dict[str, Tensor] = {"step": torch.tensor(max(float(s["step"]) for s in inner.values()))}
        for key in MOMENTS:
            whole = safe_get_full_optimizer_state(parameter, key) if self._stage else inner[parameter][key]
            found[key] = whole.detach().cpu().view(self._shapes[i]).clone()
        return found

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What ``state_dict`` gave on rank 0, or DDPEngine's. All ranks call it with the same."""
        with self._gathered(0) if self._stage == 3 else nullcontext(), torch.no_grad():
            self.module.load_state_dict(state["module"])
        if self._stage:
            self._optimizer.refresh_fp32_params()
        moments = state["optimizer"]["state"]  # empty before a first step under DDP
        for i, shape in enumerate(self._shapes):
            for key in MOMENTS:
                whole = moments[i][key] if moments else torch.zeros(shape)
                self._set_moment(self._parameters[i], key, whole.to(self._world.device, torch.float32))
        self._set_steps(float(moments[0]["step"]) if moments else 0.0)
        self._scale.load_state_dict(state["scaler"])

    def _set_moment(self, parameter: Any, key: str, whole: Tensor) -> None:
        """This rank's part of a weight's optimizer state."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if self._stage == 0:
            self._inner.state[parameter][key].copy_(whole)
        elif self._stage < 3:
            safe_set_full_optimizer_state(parameter, whole, key)
        else:  # DeepSpeed's own setter of the whole cannot deal with a last part that is padded
            n = parameter.ds_tensor.numel()
            part = whole.flatten()[self._world.rank * n : (self._world.rank + 1) * n]
            safe_set_local_optimizer_state(parameter, nn.functional.pad(part, (0, n - len(part))), key)

    def close(self) -> None:
        """Drop the hooks that hold on to the process group."""
        self._engine.destroy()
