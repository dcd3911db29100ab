"""The seam between toolkit and recipe: what a recipe gives, free of ranks, devices, checkpoints and step numbers."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

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
    """What `make_task(config, prepared)` of a recipe's task.py returns; task.py itself where it has no make_task.

    The module of `build_model` has one forward(batch). In training it returns the loss SUM over the batch's rows, each
    multiplied by batch["weight"] (see `weighted_sum`); in evaluation a dict of tensors whose first axis is the rows.
    Everything that touches a weight happens inside forward.

    `prepared` is the folder that the recipe's data.py filled; in prediction it is the model folder, which has its
    facts.json and what `save_model` wrote, and no splits.

    `build_model` and `rows` are needed, the others have defaults (see `with_defaults`). A task may have more; each is
    asked for only where it is needed:

    encode(records: list[dict[str, Any]]) -> Rows
        New data, each record a row of the user's file, in the same order. For predictions.
    file_columns: tuple[str, ...]
        Columns of records that name files. A table to predict names them relative to its own folder.
    row_bytes: int
        What an encoded row takes in memory, where that is much: so many fewer are encoded at once.
    answers(outputs: dict[str, np.ndarray], decision: Mapping[str, Any]) -> pa.Table
        What a user reads of the module's outputs, one line a row. decision: what score.py's `calibrate` made of the
        validation split. For predictions.
    conditions() -> Sequence[str]
        Other conditions that the test split is evaluated under as well, for example corruptions: `rows("test/NAME")`
        are its rows under one of them, and `predictions("test/NAME", outputs)` the table. The report shows how much
        each changes the metrics.
    is_head(name: str) -> bool
        Whether a parameter of the model, by its name, is of its head. For what fine-tuning sets apart in `optim`.
    save_model(model: nn.Module, folder: Path) -> None, and load_model(folder: Path) -> nn.Module
        The model in a form of its own, and from that folder alone. Else its state in model.safetensors, and
        `build_model` to read it.
    take_over(model: nn.Module) -> Taken | None
        Put the weights of an earlier run into a model that `build_model` has made (see init_from.take_weights), alike
        on every rank; None where the run starts anew. For a run without a checkpoint.
    """

    def build_model(self) -> nn.Module:
        """A fresh model on the CPU, its weights a function of torch's seed alone."""
        ...

    def rows(self, split: str) -> Rows:
        """The rows of "train", "validation" or "test"."""
        ...

    def collate(self, rows: list[Any], seeds: np.ndarray) -> Batch:
        """Stack rows into tensors. Augmentation draws from the per-row `seeds` alone. Default: torch's own."""
        ...

    def predictions(self, split: str, outputs: dict[str, np.ndarray]) -> pa.Table:
        """The table kept for a split: one line a row, in the order of the split's rows, as are the outputs. With the
        column `row` that names the rows, and what the recipe's score.py needs. Default: ids and outputs."""
        ...

    def example_batch(self, rows: int, length: int) -> Batch:
        """A batch of this many rows, each of this length (see `Rows.lengths`), for measuring memory; its values do not
        matter. Without "weight", as `collate` leaves it. Default: the training row whose length is nearest."""
        ...


def with_defaults(task: Any, where: str) -> Task:
    """The task with what it leaves out. ConfigError for what it must have and has not.

    where: the recipe, for the message.
    """
    if isinstance(task, _WithDefaults):
        return task
    missing = [name for name in ("build_model", "rows") if not callable(getattr(task, name, None))]
    if missing:
        raise ConfigError(
            f"the task of {where} has no {' and no '.join(missing)}. A task needs build_model() and rows(split), and "
            "may have what dist_train/task.py lists; it is what make_task(config, prepared) of task.py returns, or "
            "task.py itself."
        )
    return _WithDefaults(task)


class _WithDefaults:
    def __init__(self, task: Any) -> None:
        self._task = task

    def __getattr__(self, name: str) -> Any:
        if hasattr(self._task, name):
            return getattr(self._task, name)
        if name not in _DEFAULTS:
            raise AttributeError(name)
        return functools.partial(_DEFAULTS[name], self)


def _collate(task: Task, rows: list[Any], seeds: np.ndarray) -> Batch:
    batch: Batch = default_collate(rows)
    return batch


def _predictions(task: Task, split: str, outputs: dict[str, np.ndarray]) -> pa.Table:
    columns: dict[str, Any] = {"row": task.rows(split).ids}
    for name, values in outputs.items():
        flat = pa.array(values.reshape(-1))
        columns[name] = flat if values.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, values[0].size)
    return pa.table(columns)


def _example_batch(task: Task, rows: int, length: int) -> Batch:
    train = task.rows("train")
    nearest = int(np.abs(np.asarray(train.lengths) - length).argmin())
    return task.collate(train.take(np.full(rows, nearest)), np.zeros(rows, dtype=np.uint64))


_DEFAULTS: dict[str, Callable[..., Any]] = {
    "collate": _collate,
    "predictions": _predictions,
    "example_batch": _example_batch,
}


def facts_of_rows(task: Task) -> dict[str, Any]:
    """What is known of splits that no preparation has looked at: their rows, and a fingerprint of the rows' ids,
    lengths and weights."""
    digest, splits = hashlib.sha256(), {}
    for name in ("train", "validation", "test"):
        rows = task.rows(name)
        splits[name] = {"rows": len(rows.ids)}
        for values in (rows.ids, rows.lengths, rows.weights):
            digest.update(np.ascontiguousarray(values).tobytes())
    return {"splits": splits, "rows_fingerprint": digest.hexdigest()}


def weighted_sum(loss_per_row: Tensor, weight: Tensor) -> Tensor:
    """Sum of loss * weight over the rows. Rows of weight 0 are selected away, since NaN * 0 would be NaN."""
    return torch.where(weight > 0, loss_per_row * weight, torch.zeros_like(loss_per_row)).sum()
