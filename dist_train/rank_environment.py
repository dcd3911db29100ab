"""The environment variables of a rank: what a strategy needs, what another launcher left, what MPI names otherwise.

Torch-free: the launcher prepares its ranks with it, and a rank that somebody else has started prepares itself.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import MutableMapping

from dist_train.rundir import LAUNCHER_PID

# Accelerate reads settings from these; what the plan says must not be changed by them.
_FOREIGN = ("ACCELERATE_", "FSDP_", "MEGATRON_LM_", "PARALLELISM_CONFIG_")
# Open MPI, Intel MPI (and others with PMI), MVAPICH.
_MPI = {
    "RANK": ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK"),
    "WORLD_SIZE": ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"),
    "LOCAL_RANK": ("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "MV2_COMM_WORLD_LOCAL_RANK"),
    "LOCAL_WORLD_SIZE": ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "MV2_COMM_WORLD_LOCAL_SIZE"),
}


def strategy_environment(device: str, strategy: str, deterministic: bool) -> dict[str, str]:
    """What has to be set before torch or DeepSpeed is imported."""
    environment: dict[str, str] = {}
    if device == "cpu" and strategy.startswith("zero"):
        environment["DS_ACCELERATOR"] = "cpu"
        # DeepSpeed compiles an operator and looks for ninja on the path; pip has put it beside our Python.
        scripts = sysconfig.get_path("scripts")
        if shutil.which("ninja") is None and shutil.which("ninja", path=scripts):
            environment["PATH"] = os.pathsep.join([scripts, os.environ.get("PATH", os.defpath)])
    if device == "cuda" and deterministic:
        environment["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    return environment


def is_foreign(name: str) -> bool:
    """Whether Accelerate would take a setting from the variable `name`."""
    return name.startswith(_FOREIGN) and name != "ACCELERATE_LOG_LEVEL"


def settle_environment(device: str, strategy: str, deterministic: bool) -> None:
    """In a rank, before the engine is imported: this environment holds what the plan says and nothing else."""
    for name in [name for name in os.environ if is_foreign(name)]:
        del os.environ[name]
    os.environ.update(strategy_environment(device, strategy, deterministic))


def settle_rank_variables(environment: MutableMapping[str, str] = os.environ) -> None:
    """RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE where MPI started this rank and calls them by other names."""
    if "RANK" in environment or LAUNCHER_PID in environment:
        return  # an mpirun around our own launcher says nothing about this rank
    for name, others in _MPI.items():
        found = next((environment[other] for other in others if other in environment), None)
        if found is not None:
            environment[name] = found
