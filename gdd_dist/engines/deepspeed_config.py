"""--deepspeed-config: a JSON file that may set only placement, sharding and communication.

The engine is in no fingerprint, so options that change results are refused here; they have settings of their own.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from sharding.errors import UserError

ALLOWED = frozenset(
    "zero_optimization aio communication_data_type prescale_gradients gradient_predivide_factor comms_logger wall_clock_breakdown "
    "memory_breakdown steps_per_print".split()
)
INSTEAD = {
    "train_batch_size": "set --gan.batch and --matching.batch",
    "train_micro_batch_size_per_gpu": "set --gan.batch, --matching.batch and --accumulate",
    "gradient_accumulation_steps": "set --accumulate",
    "managed_gradient_accumulation": "set --accumulate",
    "optimizer": "set --gan.lr, --gan.beta1, --gan.beta2, --matching.lr, --matching.lr_d",
    "scheduler": "set --gan.lr, --gan.lr_final, --matching.lr",
    "gradient_clipping": "leave it out: gradients are not clipped",
    "activation_checkpointing": "set --accumulate",
    **dict.fromkeys(("fp16", "bf16", "bfloat16", "amp", "torch_autocast", "data_types"), "set --precision"),
}
ZERO_ALLOWED = frozenset(
    "stage contiguous_gradients reduce_scatter reduce_bucket_size use_multi_rank_bucket_allreduce allgather_partitions "
    "allgather_bucket_size overlap_comm offload_param offload_optimizer sub_group_size round_robin_gradients zero_hpz_partition_size "
    "prefetch_bucket_size stage3_prefetch_bucket_size param_persistence_threshold stage3_param_persistence_threshold "
    "max_live_parameters stage3_max_live_parameters max_reuse_distance stage3_max_reuse_distance model_persistence_threshold "
    "stage3_model_persistence_threshold stage3_module_granularity_threshold stage3_use_all_reduce_for_fetch_params "
    "log_trace_cache_warnings".split()
)
STAGES = (0, 1, 2, 3)


def read(path: str | None) -> dict[str, Any]:
    """Return the checked file, {} for None. Raises UserError naming an option that is not allowed, and what to set instead."""
    if path is None:
        return {}
    try:
        given = json.loads(Path(path).read_bytes())
    except OSError as e:
        raise UserError(f"cannot read --deepspeed-config {path} ({e.strerror}); give a JSON file") from e
    except ValueError as e:
        raise UserError(f"--deepspeed-config {path} is not JSON ({e}); give a JSON file") from e
    if not isinstance(given, dict):
        raise UserError(f'--deepspeed-config {path} is not a JSON object; give {{"zero_optimization": {{"stage": 2}}}}')
    for key in given:
        if key not in ALLOWED:
            raise UserError(f"{key} is not allowed in {path}; {INSTEAD.get(key) or _near(key, ALLOWED)}")
    if given.get("communication_data_type", "fp32") != "fp32":
        raise UserError(f"communication_data_type in {path} would round gradients; leave it out")
    _check_zero(given.get("zero_optimization", {}), path)
    return given


def _check_zero(zero: Any, path: str) -> None:
    if not isinstance(zero, dict):
        raise UserError(f'zero_optimization in {path} is not a JSON object; give {{"stage": 2}}')
    for key in zero:
        if key not in ZERO_ALLOWED:
            raise UserError(f"zero_optimization.{key} is not allowed in {path}; {_near(key, ZERO_ALLOWED)}")
    if zero.get("stage", 1) not in STAGES or isinstance(zero.get("stage"), bool):
        raise UserError(f"zero_optimization.stage {zero['stage']} in {path} is not known; give 0, 1, 2 or 3")
    for key in ("offload_param", "offload_optimizer"):
        if (zero.get(key) or {}).get("device", "none") not in ("none", "cpu"):
            raise UserError(f"{key} to {zero[key]['device']} in {path} is not supported; offload to cpu")


def _near(key: str, known: frozenset[str]) -> str:
    near = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.75)
    return f"did you mean {near[0]}?" if near else "leave it out: only placement and communication may be set"
