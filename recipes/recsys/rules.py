"""Decayed sequential rules: what followed what in the training, counted. Torch-free.

As a baseline they are hard to beat, and as a part of the model (`model.rules_share`) they remember what came but once.
"""

from __future__ import annotations

from collections.abc import Iterator
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
"""In the model the last event counts 1, the one before it this, the next its square, and so on."""
# In the model what came before an item follows it too, for half: tastes go both ways, sequels do not.
_BACKWARD = 0.5
# Followers of an item that the model keeps.
_MOST = 100
# Events whose pairs are counted at once: some 300 MiB.
_BLOCK = 2**18


def rule_blocks(
    events: np.ndarray, rows: np.ndarray, items: int, backward: float
) -> Iterator[tuple[int, sparse.csr_matrix]]:
    """How often the item of a row came before that of a column; d events before it, by 1 / d.

    Yields the rules of neighbouring items, so many that memory does not grow with the log: the first of them (from 0),
    and [of them, items]. events [events] int32: items from 1. rows [rows, 4]: those of the training. backward: what an
    item that came before counts beside one that came after.
    """
    # Of each target of the training where its session begins; nothing is before any other event.
    begins = np.full(len(events), len(events))
    row, target = ranges(rows[:, FIRST], rows[:, STOP])
    begins[target] = rows[row, BEGIN]
    codes = np.asarray(events)
    order = np.argsort(codes, kind="stable")
    stops = np.searchsorted(codes, np.arange(items + 1), side="right", sorter=order)
    first = 0
    while first < items:
        last = max(first + 1, int(np.searchsorted(stops, stops[first] + _BLOCK, side="right")) - 1)
        own = order[stops[first] : stops[last]]
        yield first, _count(codes, begins, own, first, (last - first, items), backward)
        first = last


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
    after = np.zeros((trained + 1, _MOST), dtype=np.int32)
    value = np.zeros((trained + 1, _MOST), dtype=np.float32)
    for first, block in rule_blocks(events, rows, trained, _BACKWARD):
        kept = strongest(block, _MOST)
        sizes = np.diff(kept.indptr)
        row = np.repeat(np.arange(first + 1, first + 1 + kept.shape[0]), sizes)
        place = np.arange(kept.nnz) - np.repeat(kept.indptr[:-1], sizes)
        after[row, place], value[row, place] = kept.indices + 1, kept.data
    np.savez_compressed(folder / FILE, after=after, value=value)


def read_rules(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """What follows each trained item and how much it counts: [trained + 1, most] int32 (0: none) and float32."""
    with np.load(folder / FILE) as stored:
        return stored["after"], stored["value"]


def _count(
    codes: np.ndarray, begins: np.ndarray, own: np.ndarray, first: int, shape: tuple[int, int], backward: float
) -> sparse.csr_matrix:
    """Of the events `own` all that came after them within reach, and before them."""
    parts = []
    for distance in range(1, HISTORY + 1):
        before = own[own + distance < len(codes)]
        before = before[begins[before + distance] <= before]
        parts.append((before, before + distance, 1 / distance))
        if backward:
            after = own[own - distance >= begins[own]]
            parts.append((after, after - distance, backward / distance))
    row = np.concatenate([codes[events] for events, _, _ in parts]) - (first + 1)
    column = np.concatenate([codes[others] for _, others, _ in parts]) - 1
    value = np.concatenate([np.full(len(events), weight, dtype=np.float32) for events, _, weight in parts])
    return sparse.coo_matrix((value, (row, column)), shape=shape).tocsr()
