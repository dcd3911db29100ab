"""Read a prepared folder: sessions over memory maps, the items, and the rows of a split. Torch-free."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dist_train.prepared import load_facts, read_split
from recipes.recsys.sessions import BEGIN, FIRST

# Gaps between events are told apart by powers of two of a second.
GAP_BUCKETS = 33


class StoredSessions:
    """What data.py has written."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.facts: dict[str, Any] = load_facts(folder)
        self.items = self._array("events")
        """Item of each event: [events] int32."""
        self.times = self._array("times") if self.facts["has_times"] else None
        """[events] int64, milliseconds since 1970."""
        self.weights = self._array("weights") if self.facts["has_weights"] else None

    def rows(self, split: str) -> np.ndarray:
        """[rows, 4] int64: where the session begins, its first target, the end of its targets, its user."""
        return self._array(split)

    @functools.cached_property
    def user_names(self) -> Any:
        return read_split(self.folder, "users")["id"]

    def moment(self, rows: np.ndarray) -> np.ndarray:
        """Time at which each row is asked: [rows] int64; 0 where there are none."""
        return np.zeros(len(rows), dtype=np.int64) if self.times is None else np.asarray(self.times[rows[:, FIRST]])

    def history(self, row: np.ndarray, most: int) -> np.ndarray:
        """Events before the row's first target, at most so many."""
        first = int(row[FIRST])
        return np.asarray(self.items[max(int(row[BEGIN]), first - most) : first])

    def _array(self, name: str) -> np.ndarray:
        return np.load(self.folder / f"{name}.npy", mmap_mode="r")


def gap_buckets(times: np.ndarray) -> np.ndarray:
    """Of rising times in milliseconds: the bucket of each pause to the time before; the first has none: 0."""
    seconds = np.diff(times, prepend=times[:1]) / 1000
    return np.minimum(np.ceil(np.log2(1 + np.maximum(seconds, 0))), GAP_BUCKETS - 1).astype(np.int64)


def read_items(folder: Path | str) -> pa.Table:
    """A line an item, from item 1 on: id, title, count (of training events), appears, available_from,
    available_until."""
    return read_split(folder, "items")


def read_content(folder: Path | str) -> tuple[np.ndarray, np.ndarray]:
    """numbers [items + 1, features] float32 and categories [items + 1, columns] int32, row 0 of no item."""
    return np.load(Path(folder) / "numbers.npy", mmap_mode="r"), np.load(Path(folder) / "categories.npy", mmap_mode="r")
