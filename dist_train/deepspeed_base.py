"""The user's own DeepSpeed JSON as a base: read it, and refuse what contradicts the recipe. Torch-free."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dist_train.config import RunConfig
from dist_train.contradictions import Settings, read_json_table, show
from dist_train.deepspeed_config import DECIDED, DECIDED_FOR_SCRIPTS, deepspeed_config, value_at
from dist_train.plan import LaunchPlan

# Of DeepSpeed 0.19.8. It refuses other keys with a traceback on every rank.
_ZERO_KEYS = """
    allgather_bucket_size allgather_partitions compute_grad_norm contiguous_gradients cpu_offload cpu_offload_param
    cpu_offload_use_pin_memory elastic_checkpoint enable_sanity_checks ignore_unused_parameters leaf_module
    legacy_stage1 load_from_fp32_weights log_trace_cache_warnings memory_efficient_linear offload_optimizer
    offload_param overlap_comm override_module_apply parameter_alignment pipeline_loading_checkpoint
    reduce_bucket_size reduce_scatter round_robin_gradients save_muon_momentum_buffer_in_memory stage
    stage3_allgather_sequential stage3_gather_16bit_weights_on_model_save stage3_gather_fp16_weights_on_model_save
    stage3_max_live_parameters stage3_max_reuse_distance stage3_model_persistence_threshold
    stage3_module_granularity_threshold stage3_param_persistence_threshold stage3_prefetch_bucket_size
    stage3_use_all_reduce_for_fetch_params sub_group_size use_multi_rank_bucket_allreduce zenflow
    zero_hpz_partition_size zero_quantized_gradients zero_quantized_nontrainable_weights zero_quantized_weights
"""
ZERO_KEYS = frozenset(_ZERO_KEYS.split())
# What would change the result, or shards in a way that the checkpoints do not know, and the values that do nothing.
_REFUSED: dict[str, tuple[Any, str]] = {
    "optimizer": (None, "the optimizer is the recipe's, optim.*"),
    "scheduler": (None, "the schedule is the recipe's, optim.schedule"),
    "amp": (None, "precision is the recipe's, train.precision"),
    "data_types": (None, "parameters and gradients are fp32; communication is parallel.communication"),
    "prescale_gradients": (False, "the engine scales the loss itself"),
    "gradient_predivide_factor": (1.0, "the engine scales the loss itself"),
    "gradient_allreduce_op": ("mean", "the engine scales the loss itself"),
    "data_efficiency": (None, "which samples a step trains is the recipe's"),
    "curriculum_learning": (None, "which samples a step trains is the recipe's"),
    "pipeline": (None, "ranks are data-parallel only"),
    "tensor_parallel": (None, "ranks are data-parallel only"),
    "sequence_parallel_size": (1, "ranks are data-parallel only"),
    "expert_parallel": (None, "ranks are data-parallel only"),
    "hybrid_engine": (None, "it is made for generation"),
    "autotuning": (None, "the plan chooses the micro-batches"),
    "compile": (None, "compilation is train.compile"),
    "weight_quantization": (None, "it changes the result"),
    "zero_optimization.zero_quantized_weights": (False, "it changes the result"),
    "zero_optimization.zero_quantized_nontrainable_weights": (False, "it changes the result"),
    "zero_optimization.zero_quantized_gradients": (False, "it changes the result"),
    "zero_optimization.zenflow": (None, "it changes the result"),
    "zero_optimization.legacy_stage1": (False, "the checkpoints do not know its shards"),
    "zero_optimization.round_robin_gradients": (False, "the checkpoints do not know its shards"),
    "zero_optimization.parameter_alignment": (False, "the checkpoints do not know its shards"),
    "zero_optimization.zero_hpz_partition_size": (1, "the checkpoints do not know its shards"),
    "zero_optimization.cpu_offload": (None, "DeepSpeed calls it offload_optimizer now, and parallel.offload decides"),
    "zero_optimization.cpu_offload_param": (None, "DeepSpeed calls it offload_param now, and parallel.offload decides"),
    "zero_optimization.compute_grad_norm": (True, "clipping and the checks for finite gradients need the norm"),
    "torch_autocast.lower_precision_safe_modules": ([], "communication is parallel.communication"),
    "zero_allow_untested_optimizer": (True, "the optimizer is torch's own"),
    "zero_force_ds_cpu_optimizer": (False, "the optimizer is torch's own"),
}


def deepspeed_base(config: RunConfig) -> dict[str, Any] | None:
    """The JSON that parallel.deepspeed_config names."""
    path = config.parallel.deepspeed_config
    return None if path is None else read_json_table(path, str(path))


def check(base: dict[str, Any], shown: str, plan: LaunchPlan, clip_norm: float | None, settings: Settings) -> list[str]:
    """What in `base` contradicts the recipe, one message each; `shown` names the file."""
    ours = deepspeed_config(plan, clip_norm)
    problems = [*_unknown(base, shown), *_precision_sections(base, shown, settings, plan)]
    for key, (harmless, why) in _REFUSED.items():
        value = value_at(base, key)
        if value is not None and value not in (harmless, "auto") and value != {}:
            problems.append(f"{shown}: {key} is set, but {why}: remove it from the file.")
        elif value == "auto" and harmless is None:
            problems.append(f'{shown}: {key} is "auto", but {why}: remove it from the file.')
    problems += _contradictions(base, ours, shown, DECIDED, settings, _resolved(plan, clip_norm))
    known = {*flat_keys(ours), *DECIDED, *_REFUSED}
    for key in flat_keys(base):
        replaced = key.partition(".")[0] in (*_REFUSED, "bf16", "fp16")
        if value_at(base, key) == "auto" and key not in known and not replaced:
            problems.append(f'{shown}: {key} is "auto", but nothing here fills it: write a value, or remove it.')
    return problems


def check_for_script(base: dict[str, Any], shown: str, ours: dict[str, Any], settings: Settings) -> list[str]:
    """As `check`, for a user's own script: how it is sharded, and a precision that was asked for."""
    problems = [*_unknown(base, shown), *_contradictions(base, ours, shown, DECIDED_FOR_SCRIPTS, settings)]
    if settings.values["train.precision"] is not None:
        problems += [
            f"{shown}: {name} is set, but {settings.stated('train.precision')}: remove the section, or leave "
            f"{settings.name('train.precision')} out."
            for name in ("bf16", "fp16", "torch_autocast")
            if base.get(name) is not None and value_at(base, f"{name}.enabled") not in (False, "auto")
        ]
    return problems


def _contradictions(
    base: dict[str, Any],
    ours: dict[str, Any],
    shown: str,
    decided: Mapping[str, str],
    settings: Settings,
    resolved: Mapping[str, Any] | None = None,
) -> Iterator[str]:
    """Where a key of `base` that the recipe decides has another value than in `ours`. resolved: what "auto" came to."""
    plain = resolved or {}
    for key, setting in decided.items():
        theirs, mine = value_at(base, key), value_at(ours, key)
        if key.endswith(".device"):
            mine = mine or "none"
        if key == "train_batch_size":
            mine = plain.get(setting)  # ours counts full micro-batches
        if theirs is None or theirs == "auto" or theirs == mine:
            continue
        if key == "torch_autocast.dtype" and not value_at(ours, "torch_autocast.enabled"):
            continue
        stated = settings.stated(setting, plain.get(setting))
        yield (
            f"{shown}: {key} is {show(theirs)}, but {stated}, which makes it {show(mine)}: set it to {show(mine)} or "
            f'"auto" in the file, or {_other_way(key, settings.name(setting), theirs)}.'
        )


def flat_keys(table: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in table.items():
        if isinstance(value, dict):
            yield from flat_keys(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def _resolved(plan: LaunchPlan, clip_norm: float | None) -> dict[str, Any]:
    return {
        "parallel.strategy": plan.strategy,
        "parallel.offload": plan.offload,
        "train.precision": plan.precision,
        "parallel.communication": plan.communication,
        "optim.clip_norm": clip_norm,
        "train.global_batch_size": plan.global_batch_size,
        "train.micro_batch_size": plan.micro_batch_size,
    }


def _other_way(key: str, setting: str, theirs: Any) -> str:
    """What to change in the recipe instead."""
    if key == "zero_optimization.stage" and theirs in (1, 2, 3):
        return f"{setting} to zero{theirs}"
    if key in ("gradient_clipping", "communication_data_type", "train_batch_size", "train_micro_batch_size_per_gpu"):
        return f"{setting} to {show(theirs)}"
    return f"change {setting}"


def _unknown(base: dict[str, Any], shown: str) -> Iterator[str]:
    section = base.get("zero_optimization", {})
    if not isinstance(section, dict):
        yield f"{shown}: zero_optimization is {show(section)}, but holds a group of keys."
        return
    for name in section:
        if name not in ZERO_KEYS:
            near = difflib.get_close_matches(name, ZERO_KEYS, n=1)
            hint = f" Did you mean {near[0]}?" if near else " Remove it."
            yield f"{shown}: zero_optimization.{name} is no key that this DeepSpeed knows.{hint}"


def _precision_sections(base: dict[str, Any], shown: str, settings: Settings, plan: LaunchPlan) -> Iterator[str]:
    for name in ("bf16", "fp16"):
        if value_at(base, f"{name}.enabled") is True:
            stated = settings.stated("train.precision", plan.precision)
            yield (
                f"{shown}: {name}.enabled is true, which casts the parameters, but {stated}, and parameters stay fp32 "
                f"in every precision: remove the section, and set train.precision to {name} if you want it."
            )


def shown_path(path: Path) -> str:
    """Relative to the working directory where the file lies below it."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
