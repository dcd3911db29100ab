"""The seam between toolkit and recipe: what a recipe gives, free of ranks, devices, checkpoints and step numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

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


class Task(Protocol):
    """What `make_task(config, prepared)` of a recipe's task.py returns.

    The module of `build_model` has one forward(batch). In training it returns the loss SUM over the batch's rows, each
    multiplied by batch["weight"] (see `weighted_sum`); in evaluation a dict of tensors whose first axis is the rows.
    Everything that touches a weight happens inside forward.
    """

    metric: str
    """Validation metric that picks the best checkpoint; higher is better."""

    def build_model(self) -> nn.Module:
        """A fresh model on the CPU, its weights a function of torch's seed alone."""
        ...

    def rows(self, split: str) -> Rows:
        """The rows of "train", "validation" or "test"."""
        ...

    def collate(self, rows: list[Any], seeds: np.ndarray) -> Batch:
        """Stack rows into tensors. Augmentation draws from the per-row `seeds` alone."""
        ...

    def example_batch(self, rows: int, length: int) -> Batch:
        """A batch of this many rows, each of this length (see `Rows.lengths`), for measuring memory: its values do not
        matter. Without "weight", as `collate` leaves it."""
        ...

    def predictions(self, split: str, outputs: dict[str, np.ndarray]) -> pa.Table:
        """The table kept for a split: one line a row, in the order of the split's rows, as are the outputs."""
        ...

    def metrics(self, predictions: pa.Table) -> dict[str, float]:
        """Point values from the kept predictions."""
        ...

    def save_model(self, model: nn.Module, folder: Path) -> None:
        """Write a folder that `load_model` reads without this run: config, safetensors, preprocessing, names."""
        ...

    def load_model(self, folder: Path) -> nn.Module:
        """The model from such a folder alone."""
        ...


def weighted_sum(loss_per_row: Tensor, weight: Tensor) -> Tensor:
    """Sum of loss * weight over the rows. Rows of weight 0 are selected away, since NaN * 0 would be NaN."""
    return torch.where(weight > 0, loss_per_row * weight, torch.zeros_like(loss_per_row)).sum()
