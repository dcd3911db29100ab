"""How fast the ranks' collectives are: what one rank sends and receives a second, as NCCL's own tests count it."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from dist_train.loop import Training
from dist_train.rundir import write_json

_MEBIBYTES = (1, 16, 64)
_REPEATS = 5


def write_bandwidth(training: Training) -> None:
    """RUN/bandwidth.json, on rank 0: GB/s by collective and size. Empty on one rank."""
    engine = training.engine
    seen: dict[str, dict[str, float]] = {}
    if engine.world_size > 1:
        for name in ("all_reduce", "all_gather", "reduce_scatter"):
            seen[name] = {f"{size} MiB": _measure(name, size, engine.device) for size in _MEBIBYTES}
    if engine.rank == 0:
        write_json(training.run.bandwidth, {"world_size": engine.world_size, "gigabytes_per_s": seen})


def _measure(name: str, mebibytes: int, device: torch.device) -> float:
    """Bus bandwidth: bytes over time, times the share that a ring moves over each link."""
    world_size = dist.get_world_size()
    count = mebibytes * 2**20 // 4 // world_size * world_size
    whole = torch.ones(count, device=device)
    part = torch.ones(count // world_size, device=device)

    def once() -> None:
        if name == "all_reduce":
            dist.all_reduce(whole)
        elif name == "all_gather":
            dist.all_gather(list(whole.chunk(world_size)), part)
        else:
            dist.reduce_scatter(part, list(whole.chunk(world_size)))

    once()
    _wait(device)
    start = time.perf_counter()
    for _ in range(_REPEATS):
        once()
    _wait(device)
    seconds = (time.perf_counter() - start) / _REPEATS
    share = (2 if name == "all_reduce" else 1) * (world_size - 1) / world_size
    return round(4 * count * share / seconds / 1e9, 3)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()
