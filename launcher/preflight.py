"""Checks before anything starts, each with its fix."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import shutil
from pathlib import Path

from dist_train.config import RunConfig
from dist_train.errors import ConfigError, StorageError
from dist_train.hardware import Hardware, find_gpu
from dist_train.plan import LaunchPlan
from dist_train.recipe import Recipe
from dist_train.rundir import RunDir, name_taken, unwritable

# Below this a run would hardly write its logs; the checkpoints' need is known once the model is.
_LEAST_FREE_MIB = 64


def check_imports() -> None:
    """The packages that the ranks import, found without importing them."""
    missing = [name for name in ("torch", "accelerate", "safetensors") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"{', '.join(missing)} cannot be imported: install the project as its README says.")


def check_metric(config: RunConfig, recipe: Recipe) -> None:
    """eval.metric names a metric of the recipe that is better when higher."""
    known = recipe.score.METRICS
    if config.eval.metric is not None and config.eval.metric not in known:
        raise ConfigError(f"eval.metric is {config.eval.metric}, but this recipe can choose by: {', '.join(known)}.")


def check_output(run: RunDir) -> None:
    """The run's name is free and its folder can be written, tried by writing. BusyError, StorageError."""
    if run.path.exists() or run.path.is_symlink():
        raise name_taken(run.path)
    folder = _existing_parent(run.path.parent)
    probe = folder / f".dist-train-probe-{os.getpid()}"
    try:
        # As root os.access says yes everywhere: only a write tells.
        probe.write_bytes(b"\0" * 4096)
        free_mib = shutil.disk_usage(folder).free / 2**20
    except OSError as error:
        raise unwritable(run.path.parent, error) from error
    finally:
        # Where the write has failed this fails with the same cause, which is being reported.
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
    if free_mib < _LEAST_FREE_MIB:
        raise StorageError(
            f"{folder} has {free_mib:.0f} MiB free, but a run needs {_LEAST_FREE_MIB} MiB at the very least: "
            "free some space, or choose another folder with output_dir=..."
        )


def check_can_start(plan: LaunchPlan) -> None:
    """What is planned can be started from here."""
    if plan.nodes > 1:
        raise ConfigError(
            f"parallel.nodes is {plan.nodes}, but this command starts ranks on this machine alone: "
            "set parallel.nodes to 1. `dist-train plan` shows a plan for several nodes."
        )
    if plan.device == "cuda" and "+cpu" in importlib.metadata.version("torch"):
        raise ConfigError(
            "there are GPUs, but this torch is built for the CPU: install its CUDA build (README: which torch), or "
            "hide the GPUs with CUDA_VISIBLE_DEVICES= (empty) to train on the CPU."
        )


def check_one_rank(plan: LaunchPlan) -> None:
    """--debug runs in one process."""
    if plan.world_size > 1:
        raise ConfigError(
            f"--debug runs one rank in this process, but the plan has {plan.world_size}: "
            "add parallel.processes_per_node=1."
        )


def _existing_parent(path: Path) -> Path:
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def check_gpus(plan: LaunchPlan, hardware: Hardware) -> None:
    """Each GPU of parallel.gpu_ids is there, and named once."""
    found = [find_gpu(hardware.gpus, word) for word in plan.gpu_ids]
    if len(set(found)) < len(found) and None not in found:
        raise ConfigError(f"parallel.gpu_ids names a GPU twice: {', '.join(plan.gpu_ids)}. Name each once.")
    for word in plan.gpu_ids:
        if find_gpu(hardware.gpus, word) is None:
            known = ", ".join(f"{gpu.index} ({gpu.uuid})" for gpu in hardware.gpus) or "none"
            raise ConfigError(f"parallel.gpu_ids names {word}, but the visible GPUs are: {known}.")
