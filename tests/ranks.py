"""Run a function on several real gloo ranks: a time limit, every rank's traceback, nothing left behind."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import pytest

# Ranks fork from a server that has imported the heavy packages once.
_CONTEXT = multiprocessing.get_context("forkserver")
os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed chooses its device when it is imported
_CONTEXT.set_forkserver_preload(
    [
        "torch",
        "torch.distributed.tensor",
        "torch._dynamo",
        "accelerate",
        "deepspeed",
        "dist_train.resume",
        "tests.fakes",
    ]
)

SHARDED = ["ddp", "zero1", "zero2", "zero3", "fsdp"]


def some(every: Sequence[str], *often: str) -> list[Any]:
    """All of them; `make test` takes those named."""
    return [pytest.param(name, marks=() if name in often else pytest.mark.matrix) for name in every]


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any, timeout_s: float = 300.0) -> list[Any]:
    """function(*arguments) on `world_size` ranks; the results in rank order. AssertionError with all tracebacks.

    The limit leaves time for the operator that DeepSpeed builds once, at the first ZeRO on a CPU.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    results = _CONTEXT.SimpleQueue()
    processes = [
        _CONTEXT.Process(target=_rank, args=(results, rank, world_size, port, function, arguments), daemon=True)
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    answers: dict[int, tuple[bool, Any]] = {}
    deadline = time.monotonic() + timeout_s
    try:
        while len(answers) < world_size and time.monotonic() < deadline:
            if results.empty():
                if all(not process.is_alive() for process in processes) and results.empty():
                    break
                time.sleep(0.01)
                continue
            rank, ok, value = results.get()
            answers[rank] = (ok, value)
            if not ok:
                deadline = min(deadline, time.monotonic() + 5.0)
    finally:
        for process in processes:
            process.kill()
            process.join()
    failures = [f"rank {rank}:\n{value}" for rank, (ok, value) in sorted(answers.items()) if not ok]
    silent = sorted(set(range(world_size)) - set(answers))
    if silent:
        failures.append(f"no answer from ranks {silent} within {timeout_s:.0f} s")
    assert not failures, "\n".join(failures)
    return [pickle.loads(answers[rank][1]) for rank in range(world_size)]


def _rank(
    results: Any, rank: int, world_size: int, port: int, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    import torch

    torch.set_num_threads(1)
    if world_size > 1:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(world_size),
            LOCAL_WORLD_SIZE=str(world_size),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            GLOO_SOCKET_IFNAME="lo",
        )
    try:
        # Plain pickle carries tensors by value: torch's own would hand over shared memory that ends with this process.
        results.put((rank, True, pickle.dumps(function(*arguments))))
    except BaseException:
        results.put((rank, False, traceback.format_exc()))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # as the worker ends, see Engine
