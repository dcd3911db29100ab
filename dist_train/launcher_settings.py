"""What `accelerate launch`, torchrun or MPI decided for ranks that it started, held against the recipe. Torch-free.

It says how many ranks and nodes there are, the recipe says strategy and precision. A variable that holds Accelerate's
own default says nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from dist_train.config_io import Loaded
from dist_train.contradictions import refuse
from dist_train.errors import ConfigError
from dist_train.plan import LaunchPlan
from dist_train.start_run import Start, check_deepspeed_base

_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
_DEEPSPEED_FILE = "ACCELERATE_DEEPSPEED_CONFIG_FILE"


def number_of_ranks() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def number_of_nodes() -> int:
    return max(1, number_of_ranks() // int(os.environ.get("LOCAL_WORLD_SIZE", number_of_ranks())))


def take_over(loaded: Loaded) -> Loaded:
    """The config with what the launcher decides: the number of nodes, and a DeepSpeed file as the base of ours."""
    parallel, sources = loaded.config.parallel, dict(loaded.sources)
    nodes = number_of_nodes()
    if parallel.nodes != nodes:
        if "parallel.nodes" in sources:
            raise ConfigError(
                f"parallel.nodes is {parallel.nodes} ({sources['parallel.nodes']}), but the launcher started "
                f"{number_of_ranks()} ranks on {nodes} node{'s' * (nodes > 1)}: set parallel.nodes to {nodes}, or "
                "leave it out."
            )
        parallel = parallel.model_copy(update={"nodes": nodes})
        sources["parallel.nodes"] = "the launcher that started the ranks"
    theirs = os.environ.get(_DEEPSPEED_FILE)
    if theirs and theirs != "none" and parallel.strategy.startswith("zero"):
        path = Path(theirs).expanduser().absolute()
        if parallel.deepspeed_config is None:
            parallel = parallel.model_copy(update={"deepspeed_config": path})
            sources["parallel.deepspeed_config"] = _DEEPSPEED_FILE
        elif parallel.deepspeed_config != path:
            raise ConfigError(
                f"{_DEEPSPEED_FILE} is {theirs}, but parallel.deepspeed_config is {parallel.deepspeed_config} "
                f"({sources['parallel.deepspeed_config']}): keep one of them."
            )
    if parallel is loaded.config.parallel:
        return loaded
    return replace(loaded, config=loaded.config.model_copy(update={"parallel": parallel}), sources=sources)


def check_launcher(start: Start) -> None:
    """ConfigError for what the launcher was told and the recipe contradicts, both named."""
    refuse([*contradictions(os.environ, start)])
    check_deepspeed_base(start)


def contradictions(environment: Mapping[str, str], start: Start) -> Iterator[str]:
    """One message for each ACCELERATE_* variable that the plan contradicts."""
    plan, settings = start.plan, start.settings

    def is_on(name: str) -> bool:
        return environment.get(name, "false").lower() in ("true", "1")

    def differs(variable: str, value: str, key: str, resolved: object, fix: str) -> str:
        return f"{variable} is {value}, but {settings.stated(key, resolved)}: {fix}."

    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision not in ("no", _PRECISION[plan.precision]):
        other = f", or set train.precision to {precision}" if precision in _PRECISION else ""
        fix = f"start with --mixed_precision {_PRECISION[plan.precision]} (mixed_precision in Accelerate's file){other}"
        yield differs("ACCELERATE_MIXED_PRECISION", precision, "train.precision", plan.precision, fix)
    zero = plan.strategy.startswith("zero")
    if is_on("ACCELERATE_USE_DEEPSPEED") and not zero:
        stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        fix = f"start without --use_deepspeed (distributed_type in Accelerate's file), or set it to zero{stage}"
        yield differs("ACCELERATE_USE_DEEPSPEED", "true", "parallel.strategy", plan.strategy, fix)
    elif is_on("ACCELERATE_USE_DEEPSPEED"):
        for variable, value, key, mine, fix in _deepspeed_variables(environment, plan, start.config.optim.clip_norm):
            yield differs(variable, value, key, mine, fix)
    if is_on("ACCELERATE_USE_FSDP") and plan.strategy != "fsdp":
        fix = "start without --use_fsdp (distributed_type in Accelerate's file), or set it to fsdp"
        yield differs("ACCELERATE_USE_FSDP", "true", "parallel.strategy", plan.strategy, fix)
    elif is_on("ACCELERATE_USE_FSDP") and is_on("FSDP_OFFLOAD_PARAMS"):
        fix = (
            "start without --fsdp_offload_params, or set parallel.strategy to zero3 and parallel.offload to parameters"
        )
        yield differs("FSDP_OFFLOAD_PARAMS", "true", "parallel.offload", plan.offload, fix)
    for variable, what in (
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "a parallelism_config"),
    ):
        if is_on(variable):
            fix = f"start without {what}, which is no strategy here"
            yield differs(variable, "true", "parallel.strategy", plan.strategy, fix)
    backend = environment.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() != "no" and not plan.compile:
        fix = "start without --dynamo_backend, or set train.compile to true"
        yield differs("ACCELERATE_DYNAMO_BACKEND", backend, "train.compile", plan.compile, fix)


def _deepspeed_variables(
    environment: Mapping[str, str], plan: LaunchPlan, clip_norm: float | None
) -> Iterator[tuple[str, str, str, object, str]]:
    """(variable, its value, the key that contradicts it, what that comes to, what to change)"""
    stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE")
    if stage is not None and f"zero{stage}" != plan.strategy:
        fix = f"start with --zero_stage {plan.strategy[-1]}, or set parallel.strategy to zero{stage}"
        yield "ACCELERATE_DEEPSPEED_ZERO_STAGE", stage, "parallel.strategy", plan.strategy, fix
    for name, offloaded in (
        ("OPTIMIZER", plan.offload is not None),
        ("PARAM", plan.offload == "parameters"),
    ):
        device = environment.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{name}_DEVICE", "none")
        if device not in ("none", "cpu") or (device == "cpu" and not offloaded):
            flag = f"--offload_{name.lower()}_device"
            wish = {"OPTIMIZER": "optimizer", "PARAM": "parameters"}[name]
            other = f", or set parallel.offload to {wish}" if device == "cpu" else ""
            fix = f"start with {flag} {'cpu' if offloaded else 'none'}{other}"
            yield f"ACCELERATE_DEEPSPEED_OFFLOAD_{name}_DEVICE", device, "parallel.offload", plan.offload, fix
    clip = environment.get("ACCELERATE_GRADIENT_CLIPPING", "auto")
    if clip not in ("auto", "1.0", "1", str(clip_norm or 0.0), f"{clip_norm or 0.0:g}"):
        fix = f"start with --gradient_clipping {clip_norm or 0.0}, or set optim.clip_norm to {clip}"
        yield "ACCELERATE_GRADIENT_CLIPPING", clip, "optim.clip_norm", clip_norm, fix
    steps = environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "auto")
    if steps not in ("auto", "1", str(plan.micro_batches)):
        fix = f"{plan.micro_batches} micro-batches follow from it and from the ranks: leave the variable out"
        yield "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", steps, "train.micro_batch_size", plan.micro_batch_size, fix
