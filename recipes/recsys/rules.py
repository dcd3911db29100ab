"""Decayed sequential rules: what followed what in the training. Torch-free.

As a baseline they are hard to beat, and as a part of the model (`model.rules_share`) they rank what it leaves in doubt.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from scipy import sparse

from recipes.recsys.sessions import BEGIN, FIRST, STOP, ranges

# Changes whenever the same training would give other rules.
VERSION = 1
FILE = "rules.npz"
HISTORY = 20
"""Events before a target that rules are made of, and that they are applied to."""
DECAY = 0.7
"""In the model the n-th event from the end counts this to the power of n."""
_BACKWARD = 0.5
_MOST = 100


def count_rules(events: np.ndarray, rows: np.ndarray, items: int) -> sparse.csr_matrix:
    """[items, items]: how often the item of a row came before that of a column; d events before it, by 1 / d.

    events [events] int32: items from 1. rows [rows, 4]: those of the training.
    """
    row, event = ranges(rows[:, FIRST], rows[:, STOP])
    begin = rows[row, BEGIN]
    follows = sparse.csr_matrix((items, items))
    for distance in range(1, HISTORY + 1):
        known = event - distance >= begin
        pairs = events[event[known] - distance] - 1, events[event[known]] - 1
        follows = follows + sparse.csr_matrix((np.full(len(pairs[0]), 1 / distance), pairs), shape=follows.shape)
    return follows


def strongest(matrix: sparse.csr_matrix, most: int) -> sparse.csr_matrix:
    """The largest entries of each row."""
    sizes = np.diff(matrix.indptr)
    row = np.repeat(np.arange(matrix.shape[0]), sizes)
    order = np.lexsort((-matrix.data, row))
    place = np.arange(len(order)) - matrix.indptr[row]
    keep = order[place < most]
    return sparse.csr_matrix((matrix.data[keep], (row[keep], matrix.indices[keep])), shape=matrix.shape)


def write_rules(folder: Path, events: np.ndarray, rows: np.ndarray, trained: int) -> None:
    """Those of each trained item, the strongest, for the model."""
    follows = count_rules(events, rows, trained)
    matrix = strongest((follows + _BACKWARD * follows.T).tocsr(), _MOST)
    sizes = np.diff(matrix.indptr)
    width = max(1, int(sizes.max()))
    after, value = np.zeros((trained + 1, width), dtype=np.int32), np.zeros((trained + 1, width), dtype=np.float32)
    row = np.repeat(np.arange(1, trained + 1), sizes)
    place = np.arange(matrix.nnz) - np.repeat(matrix.indptr[:-1], sizes)
    after[row, place], value[row, place] = matrix.indices + 1, matrix.data
    np.savez(folder / FILE, after=after, value=value)


def read_rules(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """What comes after each trained item and how much it counts: [trained + 1, most] int32 (0: none) and float32."""
    with np.load(folder / FILE) as stored:
        return stored["after"], stored["value"]
