"""The seam between toolkit and recipe: what a recipe gives, free of ranks, devices, checkpoints and step numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from dist_train.errors import ConfigError

Batch = dict[str, Tensor]


class Rows(Protocol):
    """One split. `ids` [n] int64 are unique; `lengths` [n] are what a row costs (tokens, pixels);
    `weights` [n] float64 are what a row counts in the loss."""

    ids: np.ndarray
    lengths: np.ndarray
    weights: np.ndarray

    def take(self, indices: np.ndarray) -> list[Any]:
        """The rows at these positions of the split."""
        ...


@dataclass
class ListedRows:
    """Rows that are in memory: all of one length and weight unless given, ids from 0."""

    rows: Sequence[Any]
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    weights: np.ndarray = field(default_factory=lambda: np.zeros(0))
    ids: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    def __post_init__(self) -> None:
        count = len(self.rows)
        self.lengths = self.lengths if len(self.lengths) else np.ones(count, dtype=np.int64)
        self.weights = self.weights if len(self.weights) else np.ones(count)
        self.ids = self.ids if len(self.ids) else np.arange(count, dtype=np.int64)

    def take(self, indices: np.ndarray) -> list[Any]:
        return [self.rows[index] for index in indices]


class Task(Protocol):
    """What `make_task(config, prepared)` of a recipe's task.py returns.

    The module of `build_model` has one forward(batch). In training it returns the loss SUM over the batch's rows, each
    multiplied by batch["weight"] (see `weighted_sum`); in evaluation a dict of tensors whose first axis is the rows.
    Everything that touches a weight happens inside forward.

    `prepared` is the folder that the recipe's data.py filled; in prediction it is the model folder, which has its
    facts.json and what `save_model` wrote, and no splits.

    A task may have more; each is asked for only where it is needed:

    encode(records: list[dict[str, Any]]) -> Rows
        New data, each record a row of the user's file, in the same order. For predictions.
    answers(outputs: dict[str, np.ndarray], decision: Mapping[str, Any]) -> pa.Table
        What a user reads of the module's outputs, one line a row. decision: what score.py's `calibrate` made of the
        validation split. For predictions.
    example_batch(rows: int, length: int) -> Batch
        A batch of this many rows, each of this length (see `Rows.lengths`), for measuring memory; its values do not
        matter. Without "weight", as `collate` leaves it. Else training rows of the nearest length are taken.
    save_model(model: nn.Module, folder: Path) -> None, and load_model(folder: Path) -> nn.Module
        The model in a form of its own, and from that folder alone. Else its state in model.safetensors, and
        `build_model` to read it.
    """

    def build_model(self) -> nn.Module:
        """A fresh model on the CPU, its weights a function of torch's seed alone."""
        ...

    def rows(self, split: str) -> Rows:
        """The rows of "train", "validation" or "test"."""
        ...

    def collate(self, rows: list[Any], seeds: np.ndarray) -> Batch:
        """Stack rows into tensors. Augmentation draws from the per-row `seeds` alone."""
        ...

    def predictions(self, split: str, outputs: dict[str, np.ndarray]) -> pa.Table:
        """The table kept for a split: one line a row, in the order of the split's rows, as are the outputs. With the
        column `row` (the rows' ids) and what the recipe's score.py needs."""
        ...


_REQUIRED = ("build_model", "rows", "collate", "predictions")


def check_task(task: Any, where: str) -> None:
    """ConfigError for what a task must have and has not."""
    missing = [name for name in _REQUIRED if not callable(getattr(task, name, None))]
    if missing:
        raise ConfigError(
            f"the task of {where} ({type(task).__name__}) has no {', no '.join(missing)}: a task needs "
            f"{', '.join(_REQUIRED)} (dist_train/task.py says what each returns)."
        )


def example_batch(task: Any, rows: int, length: int) -> Batch:
    """A batch for measuring memory: the task's own, or of the training row whose length is nearest."""
    if hasattr(task, "example_batch"):
        return task.example_batch(rows, length)
    train = task.rows("train")
    nearest = int(np.abs(np.asarray(train.lengths) - length).argmin())
    return task.collate(train.take(np.full(rows, nearest)), np.zeros(rows, dtype=np.uint64))


def weighted_sum(loss_per_row: Tensor, weight: Tensor) -> Tensor:
    """Sum of loss * weight over the rows. Rows of weight 0 are selected away, since NaN * 0 would be NaN."""
    return torch.where(weight > 0, loss_per_row * weight, torch.zeros_like(loss_per_row)).sum()
