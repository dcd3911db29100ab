"""Checks before anything starts, each with its fix."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil

from dist_train.errors import ConfigError
from dist_train.hardware import Hardware, find_gpu
from dist_train.rank_environment import strategy_environment
from launcher.accelerate_config import Ranks


def check_imports(strategy: str = "auto") -> None:
    """The packages that the ranks import, found without importing them."""
    needed = ["torch", "accelerate", "safetensors", *(["deepspeed"] if strategy.startswith("zero") else [])]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"{', '.join(missing)} cannot be imported: install the project as its README says.")


def check_deepspeed_build(strategy: str, device: str) -> None:
    """On CPU ranks DeepSpeed compiles an operator at its first start."""
    if device != "cpu" or not strategy.startswith("zero"):
        return
    path = strategy_environment(device, strategy, deterministic=False).get("PATH")
    lacks = []
    if shutil.which("ninja", path=path) is None:
        lacks.append("ninja (pip install ninja)")
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        lacks.append(f"a C++ compiler, {compiler} (apt-get install g++, or name another in CXX)")
    if lacks:
        raise ConfigError(
            f"parallel.strategy is {strategy}, and on a CPU DeepSpeed compiles an operator, for which "
            f"{' and '.join(lacks)} cannot be found on the path: install it, or set parallel.strategy to ddp or fsdp."
        )


def check_can_start(plan: Ranks, nodes: int = 1) -> None:
    """What is planned can be started from here, where `nodes` machines take part."""
    if plan.nodes > nodes:
        raise ConfigError(
            f"parallel.nodes is {plan.nodes}, but this command starts ranks on this machine alone: type it on every "
            "machine, with --node-rank 0, 1, ... and --head HOST:PORT of the first; or `dist-train submit` on a Slurm "
            "cluster; or set parallel.nodes (--nodes) to 1."
        )
    if plan.nodes < nodes:
        raise ConfigError(f"parallel.nodes is {plan.nodes}, but {nodes} nodes take part: set --nodes {nodes}.")
    if plan.device == "cuda" and "+cpu" in importlib.metadata.version("torch"):
        raise ConfigError(
            "there are GPUs, but this torch is built for the CPU: install its CUDA build (README: which torch), or "
            "hide the GPUs with CUDA_VISIBLE_DEVICES= (empty) to train on the CPU."
        )


def check_one_rank(plan: Ranks) -> None:
    """--debug runs in one process."""
    if plan.world_size > 1:
        raise ConfigError(
            f"--debug runs one rank in this process, but the plan has {plan.world_size}: "
            "add parallel.processes_per_node=1."
        )


def check_gpus(plan: Ranks, hardware: Hardware) -> None:
    """Each GPU of parallel.gpu_ids is there, and named once."""
    found = [find_gpu(hardware.gpus, word) for word in plan.gpu_ids]
    if len(set(found)) < len(found) and None not in found:
        raise ConfigError(f"parallel.gpu_ids names a GPU twice: {', '.join(plan.gpu_ids)}. Name each once.")
    for word in plan.gpu_ids:
        if find_gpu(hardware.gpus, word) is None:
            known = ", ".join(f"{gpu.index} ({gpu.uuid})" for gpu in hardware.gpus) or "none"
            raise ConfigError(f"parallel.gpu_ids names {word}, but the visible GPUs are: {known}.")
