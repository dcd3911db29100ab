"""What a Slurm job's environment says."""

from __future__ import annotations

import pytest

from slurm.allocation import Allocation, read_allocation


def test_a_job_is_read_from_its_variables() -> None:
    environment = {
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_NODEID": "1",
        "SLURM_JOB_NODELIST": "node[01-02]",
        "SLURM_CPUS_ON_NODE": "32",
        "SLURM_GPUS_ON_NODE": "4",
        "SLURM_RESTART_COUNT": "1",
    }
    assert read_allocation(environment) == Allocation("17", 2, 1, "node[01-02]", 32, 4, 1)


@pytest.mark.parametrize(("word", "count"), [("gpu:4", 4), ("gpu:a100:8", 8), ("", None)])
def test_gpus_may_come_with_their_kind(word: str, count: int | None) -> None:
    job = read_allocation({"SLURM_JOB_ID": "1", "SLURM_GPUS_ON_NODE": word})
    assert job is not None
    assert job.gpus_on_node == count


def test_outside_a_job_there_is_none() -> None:
    assert read_allocation({}) is None
