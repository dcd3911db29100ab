"""LaunchPlan to a complete DeepSpeed JSON, alone or on top of the user's own. Torch-free.

Precision is DeepSpeed's `torch_autocast`, never its `bf16` or `fp16` sections: those cast the parameters, and here
parameters are fp32 under every strategy.
"""

from __future__ import annotations

from typing import Any

from dist_train.plan import LaunchPlan
from dist_train.zero_sizes import (
    ALLGATHER_BUCKET_SIZE,
    REDUCE_BUCKET_SIZE,
    STAGE3_MAX_LIVE_PARAMETERS,
    STAGE3_MAX_REUSE_DISTANCE,
    STAGE3_PARAM_PERSISTENCE_THRESHOLD,
    STAGE3_PREFETCH_BUCKET_SIZE,
    SUB_GROUP_SIZE,
)

_AUTOCAST_DTYPE = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

# What the recipe decides: DeepSpeed's key, and the setting that it follows. The user's own JSON may repeat it.
DECIDED = {
    "zero_optimization.stage": "parallel.strategy",
    "zero_optimization.offload_optimizer.device": "parallel.offload",
    "zero_optimization.offload_param.device": "parallel.offload",
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.micro_batch_size",
    "gradient_clipping": "optim.clip_norm",
    "communication_data_type": "parallel.communication",
    "torch_autocast.enabled": "train.precision",
    "torch_autocast.dtype": "train.precision",
}
# The same for a user's own script, which has its own batches, optimizer and clipping.
DECIDED_FOR_SCRIPTS = {key: DECIDED[key] for key in list(DECIDED)[:3]}
# Sections that a recipe's own settings replace.
REPLACED = ("bf16", "fp16", "optimizer", "scheduler")


def deepspeed_config(plan: LaunchPlan, clip_norm: float | None, base: dict[str, Any] | None = None) -> dict[str, Any]:
    """For zero1, zero2 and zero3: no key is left to DeepSpeed's "auto".

    base: the user's own JSON; keys that the plan does not decide are kept. deepspeed_base.py refuses contradictions.
    """
    ours: dict[str, Any] = {
        # The engine marks the boundary of the accumulation itself: steps may differ in their micro-batches.
        "train_batch_size": plan.micro_batch_size * plan.micro_batches * plan.world_size,
        "train_micro_batch_size_per_gpu": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.micro_batches,
        "gradient_clipping": clip_norm or 0.0,
        "communication_data_type": plan.communication,
        "torch_autocast": _autocast(plan.precision),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "wall_clock_breakdown": False,
        "steps_per_print": None,
        "zero_optimization": _zero_optimization(plan.strategy, plan.offload, plan.device),
    }
    return ours if base is None else _on_top(base, ours, {**DECIDED, **dict.fromkeys(REPLACED, "")})


def script_deepspeed_config(
    strategy: str, offload: str | None, device: str, precision: str | None, base: dict[str, Any] | None = None
) -> dict[str, Any]:
    """For a user's own script. Batches, clipping and optimizer are the script's: Accelerate and the Hugging Face
    Trainer replace "auto" by what it says, and only here "auto" stands.

    precision: fp32, bf16 or fp16 as in a recipe; None leaves it to the script, in DeepSpeed's own meaning.
    """
    ours: dict[str, Any] = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "wall_clock_breakdown": False,
        "steps_per_print": None,
        "zero_optimization": _zero_optimization(strategy, offload, device),
    }
    decided = dict(DECIDED_FOR_SCRIPTS)
    if precision is None:
        ours |= {"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}
    else:
        off = {"bf16": {"enabled": False}, "fp16": {"enabled": False}}
        ours |= {"torch_autocast": _autocast(precision), "communication_data_type": "fp32", **off}
        decided |= dict.fromkeys(("torch_autocast", "bf16", "fp16"), "train.precision")
    if strategy == "zero3":
        # A script saves its model by gathering the whole of it.
        ours["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    return ours if base is None else _on_top(base, ours, decided)


def value_at(table: dict[str, Any], key: str) -> Any:
    """The value at a dotted key; None where there is none."""
    place: Any = table
    for part in key.split("."):
        place = place.get(part) if isinstance(place, dict) else None
    return place


def _autocast(precision: str) -> dict[str, Any]:
    # DeepSpeed would reduce the gradients of the modules in this list in the lower precision.
    return {
        "enabled": precision != "fp32",
        "dtype": _AUTOCAST_DTYPE[precision],
        "lower_precision_safe_modules": [],
    }


def _zero_optimization(strategy: str, offload: str | None, device: str) -> dict[str, Any]:
    stage = int(strategy.removeprefix("zero"))
    section: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": device == "cuda",
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "reduce_bucket_size": REDUCE_BUCKET_SIZE,
        "allgather_bucket_size": ALLGATHER_BUCKET_SIZE,
    }
    if stage == 3:
        section |= {
            "stage3_prefetch_bucket_size": STAGE3_PREFETCH_BUCKET_SIZE,
            "stage3_param_persistence_threshold": STAGE3_PARAM_PERSISTENCE_THRESHOLD,
            "stage3_max_live_parameters": STAGE3_MAX_LIVE_PARAMETERS,
            "stage3_max_reuse_distance": STAGE3_MAX_REUSE_DISTANCE,
            "sub_group_size": SUB_GROUP_SIZE,
            "stage3_gather_16bit_weights_on_model_save": False,
        }
    on_cpu = {"device": "cpu", "pin_memory": device == "cuda"}
    if offload is not None:
        section["offload_optimizer"] = dict(on_cpu)
    if offload == "parameters":
        section["offload_param"] = dict(on_cpu)
    return section


def _on_top(base: dict[str, Any], ours: dict[str, Any], decided: dict[str, str], prefix: str = "") -> dict[str, Any]:
    """`base` with what is decided replaced, its "auto" filled, and what it lacks added."""
    merged = dict(ours)
    for name, value in base.items():
        key = prefix + name
        if isinstance(value, dict) and key not in decided:
            mine = ours.get(name)
            inner = _on_top(value, mine if isinstance(mine, dict) else {}, decided, f"{key}.")
            if inner or not value:
                merged[name] = inner
        elif key not in decided and not (value == "auto" and name in ours):
            merged[name] = value
    return merged
