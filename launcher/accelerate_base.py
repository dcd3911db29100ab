"""The user's own Accelerate file as a base: read it, refuse what contradicts the recipe, keep the rest."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from dist_train.contradictions import Settings, read_json_table, show
from dist_train.deepspeed_config import value_at
from dist_train.yaml_data import read_file

# Of Accelerate 1.15; it refuses other keys.
_KEYS = """
    command_file commands compute_environment debug deepspeed_config distributed_type downcast_bf16 dynamo_config
    enable_cpu_affinity fp8_config fsdp_config gpu_ids machine_rank main_process_ip main_process_port
    main_training_function megatron_lm_config mixed_precision mpirun_config num_machines num_processes
    parallelism_config rdzv_backend same_network tpu_env tpu_name tpu_use_cluster tpu_use_sudo tpu_vm tpu_zone use_cpu
"""
KNOWN = frozenset(_KEYS.split())
# What the user's file may say without a contradiction; the rest of it follows from the recipe.
_KEPT = (
    *("main_process_ip", "main_process_port", "main_training_function", "rdzv_backend", "same_network", "debug"),
    "enable_cpu_affinity",
)
# Sections that have no place here, and why.
_REFUSED = {
    "megatron_lm_config": "Megatron-LM is no strategy here",
    "parallelism_config": "ranks are data-parallel only",
    "fp8_config": "fp8 is no precision here",
    "mpirun_config": "the ranks are not started by MPI here; `accelerate launch ... -m dist_train.worker RECIPE` is",
    "tpu_name": "TPUs are not supported",
    "tpu_vm": "TPUs are not supported",
}
# The setting behind each key of the file's top level.
_SETTINGS = {
    "distributed_type": "parallel.strategy",
    "mixed_precision": "train.precision",
    "num_machines": "parallel.nodes",
    "num_processes": "parallel.processes_per_node",
}
# The same of its deepspeed_config. Accelerate refuses these beside the JSON, which holds them.
_DEEPSPEED_SETTINGS = {
    "zero_stage": ("zero_optimization.stage", "parallel.strategy"),
    "offload_optimizer_device": ("zero_optimization.offload_optimizer.device", "parallel.offload"),
    "offload_param_device": ("zero_optimization.offload_param.device", "parallel.offload"),
    "gradient_accumulation_steps": ("gradient_accumulation_steps", "train.micro_batch_size"),
    "gradient_clipping": ("gradient_clipping", "optim.clip_norm"),
}
_BESIDE_THE_JSON = frozenset(_DEEPSPEED_SETTINGS) | frozenset(
    ("zero3_save_16bit_model", "offload_optimizer_nvme_path", "offload_param_nvme_path", "deepspeed_config_file")
)


def read_accelerate_base(path: Path, shown: str) -> dict[str, Any]:
    """The mapping in an Accelerate config, YAML or JSON. ConfigError, UnsafeInputError."""
    if path.suffix == ".json":
        return read_json_table(path, shown)
    read_file(path, shown)  # refuses what is more than plain data, or too large
    table: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8-sig")) or {}
    return table


def check(
    base: dict[str, Any], shown: str, ours: dict[str, Any], deepspeed: dict[str, Any] | None, settings: Settings
) -> list[str]:
    """What in `base` contradicts the recipe, one message each.

    ours: the generated config without a base. deepspeed: the generated JSON, under ZeRO.
    """
    problems = [*_no_key(base, shown)]
    for key, setting in _SETTINGS.items():
        theirs, mine = _plain(base.get(key)), ours.get(key)
        if key == "mixed_precision" and deepspeed is not None:
            mine = _precision(deepspeed)
        if theirs is not None and mine is not None and theirs != mine and not _same_type(theirs, mine):
            problems.append(_contradiction(shown, key, theirs, mine, setting, settings))
    if base.get("use_cpu") and not ours["use_cpu"]:
        problems.append(
            f"{shown}: use_cpu is true, but there are GPUs: set it to false, or hide the GPUs with "
            "CUDA_VISIBLE_DEVICES= (empty)."
        )
    if base.get("gpu_ids") not in (None, "all"):
        problems.append(
            f"{shown}: gpu_ids is {show(base['gpu_ids'])}, but which GPUs are used is parallel.gpu_ids (or --gpu-ids): "
            "set it to all in the file."
        )
    backend = (base.get("dynamo_config") or {}).get("dynamo_backend", "NO")
    if str(_plain(backend)).upper() != "NO":
        problems.append(
            f"{shown}: dynamo_config.dynamo_backend is {backend}, but compilation is train.compile (or the script's "
            "own): set it to NO in the file."
        )
    if isinstance(base.get("deepspeed_config"), dict) and deepspeed is not None:
        problems += _deepspeed_section(base["deepspeed_config"], shown, deepspeed, settings)
    if isinstance(base.get("fsdp_config"), dict) and ours["distributed_type"] == "FSDP":
        problems += _fsdp_section(base["fsdp_config"], shown)
    return problems


def on_top(base: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """`ours` with what the user's file may decide: network, ports, and how FSDP wraps a script's model."""
    merged = {**ours, **{name: base[name] for name in _KEPT if base.get(name) is not None}}
    for section in ("deepspeed_config", "fsdp_config"):
        if section in ours and isinstance(base.get(section), dict):
            kept = {key: value for key, value in base[section].items() if key not in _BESIDE_THE_JSON}
            merged[section] = {**ours[section], **kept}
    return merged


def _no_key(base: dict[str, Any], shown: str) -> Iterator[str]:
    for key in base:
        if key not in KNOWN:
            near = difflib.get_close_matches(str(key), KNOWN, n=1)
            yield f"{shown}: {key} is no key of an Accelerate config.{f' Did you mean {near[0]}?' if near else ''}"
        elif key in _REFUSED and base[key]:
            yield f"{shown}: {key} is set, but {_REFUSED[key]}: remove it from the file."
    if base.get("compute_environment") not in (None, "LOCAL_MACHINE"):
        yield f"{shown}: compute_environment is {base['compute_environment']}, but must be LOCAL_MACHINE."


def _deepspeed_section(
    section: dict[str, Any], shown: str, deepspeed: dict[str, Any], settings: Settings
) -> Iterator[str]:
    for key, (in_json, setting) in _DEEPSPEED_SETTINGS.items():
        theirs, mine = section.get(key), value_at(deepspeed, in_json)
        if key.endswith("_device"):
            mine = mine or "none"
        if theirs not in (None, "auto", mine) and mine != "auto":
            yield _contradiction(shown, f"deepspeed_config.{key}", theirs, mine, setting, settings)
    if section.get("deepspeed_config_file") is not None:
        yield (
            f"{shown}: deepspeed_config.deepspeed_config_file is {section['deepspeed_config_file']}, but a run writes "
            f"its own: give yours as {settings.name('parallel.deepspeed_config')}, and remove the key."
        )


def _fsdp_section(section: dict[str, Any], shown: str) -> Iterator[str]:
    for key, allowed in (("fsdp_version", 2), ("fsdp_offload_params", False)):
        if section.get(key) not in (None, allowed):
            yield f"{shown}: fsdp_config.{key} is {show(section[key])}, but must be {show(allowed)} here."


def _contradiction(shown: str, key: str, theirs: Any, mine: Any, setting: str, settings: Settings) -> str:
    return (
        f"{shown}: {key} is {show(theirs)}, but {settings.stated(setting)}, which makes it {show(mine)}: set it to "
        f"{show(mine)} in the file, or change {settings.name(setting)}."
    )


def _precision(deepspeed: dict[str, Any]) -> str | None:
    """Accelerate's word for the precision that the DeepSpeed JSON holds; None where the script decides."""
    if value_at(deepspeed, "torch_autocast.enabled") is None:
        return None
    words = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}
    return words[value_at(deepspeed, "torch_autocast.dtype")]


def _plain(value: Any) -> Any:
    """YAML reads `no` without quotes as false."""
    return "no" if value is False else value


def _same_type(theirs: Any, mine: Any) -> bool:
    """NO, MULTI_CPU and MULTI_GPU say only how many ranks there are and on what, which other keys say too."""
    replicated = ("NO", "MULTI_CPU", "MULTI_GPU")
    return theirs in replicated and mine in replicated
