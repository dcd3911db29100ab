"""dist-train node: what a Slurm job runs on each of its nodes, one launcher a node. Called by the script of submit."""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import time
from typing import Any

from dist_train.errors import ConfigError, StorageError, ToolkitError, error_for_code
from dist_train.rundir import RunDir, read_json, write_atomic, write_json
from launcher import launch, start
from launcher.handed_in import members_of
from launcher.meeting import MEETING_S
from launcher.nodes import Notices, Place, follow
from slurm.allocation import Allocation, read_allocation

_POLL_S = 0.5


def run_node(path: str, index: int | None) -> RunDir | None:
    """Train the run on this node of the job; index: of an array whose folder is `path`. Returns the run on node 0."""
    allocation = read_allocation()
    if allocation is None:
        raise ConfigError("this is no Slurm job: dist-train submit makes one, which then calls this command.")
    pid_file = RunDir(path).head_pid
    directory = RunDir(path)
    if index is not None:
        directory = members_of(directory.path)[index]
        pid_file = pid_file.with_name(f"{pid_file.name}{index}")
    if not directory.plan.is_file() and not directory.config.is_file():
        raise ConfigError(f"{directory.path} is no run that was submitted.")
    place, notices = None, None
    if allocation.nodes > 1 and allocation.node_rank > 0:
        _follow(directory, allocation)
        return None
    if allocation.nodes > 1:
        host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        _check_name(host, allocation)
        place = Place(0, allocation.nodes, host, 0)
        notices = Notices(
            functools.partial(_announce, directory, allocation, host), functools.partial(_hear, directory, allocation)
        )
    write_atomic(pid_file, f"{os.getpid()}\n")
    train = launch.launch_in_job if _is_script(directory) else start.train_in_job
    train(directory, place, notices)
    return None if _is_script(directory) else directory


def _is_script(directory: RunDir) -> bool:
    return not directory.config.is_file()


def _check_name(host: str, allocation: Allocation) -> None:
    try:
        socket.getaddrinfo(host, None)
    except socket.gaierror as error:
        raise ConfigError(
            f"node {allocation.node_rank} ({socket.gethostname()}) cannot resolve its own name as the others know it, "
            f"{host} ({error.strerror}): the cluster's name service or /etc/hosts must know it."
        ) from error


def _follow(directory: RunDir, allocation: Allocation) -> None:
    """Another node's part. Node 0, which may wait for it, reads why it cannot come."""
    start_ranks = launch.ranks_of_node if _is_script(directory) else start.ranks_of_node
    try:
        follow(_announced_place(directory, allocation), start_ranks, [str(directory.path)])
    except ToolkitError as error:
        write_json(directory.absent, {**_start_of(allocation), "code": error.exit_code, "message": str(error)})
        raise


def _hear(directory: RunDir, allocation: Allocation) -> None:
    with contextlib.suppress(StorageError):
        said = read_json(directory.absent)
        if said.items() >= _start_of(allocation).items():
            raise error_for_code(said["code"])(said["message"])


def _start_of(allocation: Allocation) -> dict[str, Any]:
    """What tells this start of the job from the ones before."""
    return {"job": allocation.job_id, "restarts": allocation.restarts}


def _announce(directory: RunDir, allocation: Allocation, host: str, port: int) -> None:
    write_json(directory.head, {**_start_of(allocation), "host": host, "port": port})


def _announced_place(directory: RunDir, allocation: Allocation) -> Place:
    """Where node 0 of this very start of the job listens, for this node."""
    deadline = time.monotonic() + MEETING_S
    while time.monotonic() < deadline:
        with contextlib.suppress(StorageError):
            head = read_json(directory.head)
            if head.items() >= _start_of(allocation).items():
                return Place(allocation.node_rank, allocation.nodes, head["host"], int(head["port"]))
        time.sleep(_POLL_S)
    raise ConfigError(
        f"node {allocation.node_rank} ({socket.gethostname()}) did not hear of node 0 within {MEETING_S:.0f} s: "
        f"{directory.head} must lie on a file system that all nodes share, and node 0 must have started."
    )
