"""dist-train node: what a Slurm job runs on each of its nodes, one launcher a node. Called by the script of submit."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from dist_train.errors import BusyError, ConfigError, StorageError
from dist_train.rundir import RunDir, read_json, write_atomic, write_json
from launcher import launch, start
from launcher.array import member_of
from launcher.meeting import MEETING_S
from launcher.nodes import Place, follow
from slurm import client
from slurm.allocation import Allocation, read_allocation

# The job of before may still be ending on another node.
_HELD_S = 120.0
_POLL_S = 0.5


def run_node(path: str, index: int | None) -> RunDir | None:
    """Train the run on this node of the job; index: of an array whose folder is `path`. Returns the run on node 0."""
    allocation = read_allocation()
    if allocation is None:
        raise ConfigError("this is no Slurm job: dist-train submit makes one, which then calls this command.")
    pid_file = RunDir(path).head_pid
    directory = RunDir(path)
    if index is not None:
        directory = member_of(directory.path, index)
        pid_file = pid_file.with_name(f"{pid_file.name}{index}")
    if not directory.plan.is_file() and not directory.config.is_file():
        raise ConfigError(f"{directory.path} is no run that was submitted.")
    if allocation.nodes == 1:
        return _lead(directory, pid_file, None, lambda port: None)
    host = client.host_names(allocation.node_names)[0]
    _check_name(host, allocation)
    if allocation.node_rank == 0:
        place = Place(0, allocation.nodes, host, 0)
        return _lead(directory, pid_file, place, lambda port: _announce(directory, allocation, port))
    port = _announced_port(directory, allocation)
    place = Place(allocation.node_rank, allocation.nodes, host, port)
    follow(place, launch.ranks_of_node if _is_script(directory) else start.ranks_of_node, [str(directory.path)])
    return None


def _lead(directory: RunDir, pid_file: Path, place: Place | None, announce: Callable[[int], None]) -> RunDir | None:
    with _held(directory):
        write_atomic(pid_file, f"{os.getpid()}\n")
        if _is_script(directory):
            launch.launch_in_job(directory, place, announce)
            return None
        start.train_in_job(directory, place, announce)
    return directory


def _is_script(directory: RunDir) -> bool:
    return not directory.config.is_file()


@contextlib.contextmanager
def _held(directory: RunDir) -> Iterator[None]:
    """Hold the directory, as soon as whoever had it before lets go."""
    deadline = time.monotonic() + _HELD_S
    while True:
        held = contextlib.ExitStack()
        try:
            held.enter_context(directory.locked())
        except BusyError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_POLL_S)
            continue
        with held:
            yield
        return


def _check_name(host: str, allocation: Allocation) -> None:
    try:
        socket.getaddrinfo(host, None)
    except socket.gaierror as error:
        raise ConfigError(
            f"node {allocation.node_rank} ({socket.gethostname()}) cannot resolve the name of the job's first node, "
            f"{host} ({error.strerror}): the cluster's name service or /etc/hosts must know it."
        ) from error


def _announce(directory: RunDir, allocation: Allocation, port: int) -> None:
    write_json(directory.head, {"job": allocation.job_id, "restarts": allocation.restarts, "port": port})


def _announced_port(directory: RunDir, allocation: Allocation) -> int:
    """Where node 0 of this very start of the job listens."""
    deadline = time.monotonic() + MEETING_S
    while time.monotonic() < deadline:
        with contextlib.suppress(StorageError):
            head = read_json(directory.head)
            if (head["job"], head["restarts"]) == (allocation.job_id, allocation.restarts):
                return int(head["port"])
        time.sleep(_POLL_S)
    raise ConfigError(
        f"node {allocation.node_rank} ({socket.gethostname()}) did not hear of node 0 within {MEETING_S:.0f} s: "
        f"{directory.head} must lie on a file system that all nodes share, and node 0 must have started."
    )
