"""Exact distributed evaluation: every row of a split once, whatever the number of ranks."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dist_train.data import row_seeds
from dist_train.engine import Engine
from dist_train.events import log_event
from dist_train.task import Batch, Rows, Task

# An evaluation is told of when it has taken this long, and then so often.
_TELL_EVERY_S = 2.0
Told = Callable[[int, int], None]
"""Takes how many batches of a rank are done, and of how many."""


def evaluate(
    engine: Engine, task: Task, rows: Rows, batch_size: int, told: Told = lambda done, total: None
) -> dict[str, np.ndarray]:
    """The module's outputs for all `rows`, in their order, on every rank.

    Rows of one length share a batch; which rank ran a row changes nothing but rounding.
    """
    module = engine.module

    def forward(batch: Batch) -> dict[str, Tensor]:
        return engine.forward(engine.to_device(batch))

    order = np.argsort(-rows.lengths, kind="stable")
    mine = order[engine.rank :: engine.world_size]
    # As many forward passes on every rank: under zero3 and fsdp each one is a collective. At least one, so that each
    # rank knows the outputs' names and shapes.
    batches = max(1, -(-len(order) // (engine.world_size * batch_size)))
    outputs: list[dict[str, np.ndarray]] = []
    was_training = module.training
    module.eval()
    with torch.no_grad():
        for index in range(batches):
            chosen = mine[index * batch_size : (index + 1) * batch_size]
            outputs.append(forward_rows(forward, task, rows, chosen if len(chosen) else order[:1]))
            told(index + 1, batches)
    module.train(was_training)
    ids = engine.gather_rows(rows.ids[mine])
    gathered = {
        name: engine.gather_rows(np.concatenate([part[name] for part in outputs])[: len(mine)]) for name in outputs[0]
    }
    place = np.argsort(ids, kind="stable")
    expected = np.argsort(rows.ids, kind="stable")
    if not np.array_equal(ids[place], rows.ids[expected]):
        raise AssertionError("evaluation did not see every row exactly once")
    back = np.empty_like(expected)
    back[expected] = place
    return {name: values[back] for name, values in gathered.items()}


def tell(engine: Engine, events: Path, split: str) -> Told:
    """On rank 0 what writes how far an evaluation is into events.jsonl, where the command reads it."""
    last = time.monotonic()

    def told(done: int, total: int) -> None:
        nonlocal last
        if engine.rank == 0 and time.monotonic() - last >= _TELL_EVERY_S:
            last = time.monotonic()
            log_event(events, "evaluating", split=split, done=done, total=total)

    return told


def forward_rows(
    forward: Callable[[Batch], dict[str, Tensor]], task: Task, rows: Rows, chosen: np.ndarray
) -> dict[str, np.ndarray]:
    """What `forward` says of the rows at these positions, as one batch."""
    batch = task.collate(rows.take(chosen), row_seeds(0, 0, rows.ids[chosen]))
    batch["weight"] = torch.from_numpy(rows.weights[chosen]).float()
    # Whole numbers stay what they are: float32 cannot tell counts above 16 million apart.
    return {
        name: (value.float() if value.is_floating_point() else value).cpu().numpy()
        for name, value in forward(batch).items()
    }
