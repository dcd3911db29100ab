"""One rank of the raw loop of raw_loop.py: RUN WARM_UP STEPS OUTPUT, under torchrun."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dist_train.config_io import load_run_config
from dist_train.data import Schedule, partition, row_seeds
from dist_train.plan import LaunchPlan
from dist_train.recipe import load_recipe
from dist_train.rundir import RunDir, read_json
from dist_train.task import Batch, Task


def main() -> None:
    run, warm_up, steps, output = RunDir(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    config, plan = load_run_config(run), LaunchPlan.from_json(read_json(run.plan))
    task = load_recipe(config.recipe).make_task(config, Path(read_json(run.data_facts)["folder"]))
    device = torch.device("cuda" if plan.device == "cuda" else "cpu")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if device.type == "cuda":
        torch.cuda.set_device(rank)
    torch.manual_seed(0)
    module = task.build_model().to(device)
    module.train()
    model = DistributedDataParallel(module, gradient_as_bucket_view=True) if world_size > 1 else module
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optim.lr, fused=True)
    batches = [_batches(task, plan, config.seed, step, rank) for step in range(warm_up + steps)]
    samples = 0
    for step, parts in enumerate(batches):
        if step == warm_up:
            dist.barrier()
            began = time.perf_counter()
        for index, batch in enumerate(parts):
            last = index == len(parts) - 1 or world_size == 1
            with contextlib.nullcontext() if last else model.no_sync():
                loss = model({name: tensor.to(device) for name, tensor in batch.items()})
                (loss * world_size / plan.global_batch_size).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        samples += plan.global_batch_size * (step >= warm_up)
    dist.barrier()
    if rank == 0:
        output.write_text(json.dumps({"samples_per_s": samples / (time.perf_counter() - began)}))


def _batches(task: Task, plan: LaunchPlan, seed: int, step: int, rank: int) -> list[Batch]:
    """The micro-batches of this rank, as the toolkit makes them."""
    rows = task.rows("train")
    schedule = Schedule(len(rows.ids), plan.global_batch_size, seed)
    chosen = schedule.rows_of(step)
    parts = partition(rows.lengths[chosen], plan.world_size, plan.micro_batches, plan.micro_batch_size)[rank]
    batches = []
    for part in parts:
        indices = chosen[part]
        seeds = row_seeds(seed, schedule.epoch_of(step), rows.ids[indices])
        batch = task.collate(rows.take(indices), seeds)
        batches.append({**batch, "weight": torch.from_numpy(np.ascontiguousarray(rows.weights[indices])).float()})
    return batches


if __name__ == "__main__":
    main()
