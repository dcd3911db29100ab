"""The Slurm job that this process is part of, from its SLURM_* variables."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Allocation:
    job_id: str
    nodes: int
    node_rank: int
    node_names: str
    """As Slurm writes them, for example node[01-04]."""
    cpus_on_node: int | None
    gpus_on_node: int | None
    restarts: int
    """How often the job was requeued."""


def read_allocation(environment: Mapping[str, str] = os.environ) -> Allocation | None:
    """None outside a job."""
    job_id = environment.get("SLURM_JOB_ID")
    if not job_id:
        return None
    return Allocation(
        job_id=job_id,
        nodes=_number(environment, "SLURM_STEP_NUM_NODES") or _number(environment, "SLURM_JOB_NUM_NODES") or 1,
        node_rank=_number(environment, "SLURM_NODEID") or 0,
        node_names=environment.get("SLURM_JOB_NODELIST", ""),
        cpus_on_node=_number(environment, "SLURM_CPUS_ON_NODE"),
        gpus_on_node=_number(environment, "SLURM_GPUS_ON_NODE"),
        restarts=_number(environment, "SLURM_RESTART_COUNT") or 0,
    )


def _number(environment: Mapping[str, str], name: str) -> int | None:
    """SLURM_GPUS_ON_NODE may read `gpu:4` or `a100:4`; the number comes last."""
    word = environment.get(name, "").rpartition(":")[2]
    return int(word) if word.isdigit() else None
