"""What a recommender must beat: popularity, item-kNN, decayed sequential rules and EASE, on the same rows.

The settings of each are chosen on the validation split: a weak baseline would prove nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from scipy import sparse

from dist_train.baselines import SPLITS, Tables
from recipes.recsys.config import Config
from recipes.recsys.measures import ndcg, ranks_of
from recipes.recsys.predictions import make_table
from recipes.recsys.rules import HISTORY, rule_blocks, strongest
from recipes.recsys.sessions import BEGIN, FIRST, STOP, USER, ranges
from recipes.recsys.stored import StoredSessions, read_items

# Changes whenever a baseline would come out differently.
VERSION = 3
ABOUT = {
    "popularity": "the items that were taken most often, in a window that ends with the training",
    "item_knn": "items that the same users took, by cosine",
    "rules": "what followed the session's items before, the last ones counting most",
    "ease": "a linear autoencoder in closed form (Steck 2019)",
}
MOST_EASE_ITEMS = 15_000
_WINDOWS = (1.0, 0.5, 0.25, 0.1, 0.05)
_DECAYS, _BACKWARD, _NORMS = (0.5, 0.7, 0.9), (0.0, 0.5, 1.0), (0.0, 0.5)
_SHRINKS = (1.0, 10.0)
_RIDGES = (50.0, 250.0, 1000.0)
# Above so many items one setting of EASE alone: each takes a minute.
_MOST_CHOSEN_EASE = 6_000
# Of each item at most so many others are kept, and of a large catalogue so many entries in all: 512 MiB.
_NEIGHBOURS, _FOLLOWERS = 200, 1_000
_LEAST_KEPT, _MOST_ENTRIES = 20, 2**26
# Pairs of items of one user that are counted at once: some 200 MiB.
_BLOCK = 2**23
# Rows of the validation split that settings are chosen on, and scores of all of them.
_LEAST_JUDGED, _MOST_JUDGED, _MOST_SCORES = 500, 5_000, 2**28
# What tells items apart that a baseline scores alike.
_LEAST = 1e-6
Scorer = Callable[[np.ndarray], np.ndarray]
"""From rows [rows, 4] to scores [rows, items]."""


def train_baselines(prepared: Path, config: Config, names: list[str]) -> Tables:
    """Predictions of each for validation and test."""
    world = _World(prepared, config)
    tables: Tables = {}
    for name in names:
        scorer = max(_MADE[name](world), key=lambda made: world.judge(made))
        for split in SPLITS:
            tables[name, split] = world.predict(scorer, split)
    return tables


class _World:
    """The training as matrices, and the rows to answer."""

    def __init__(self, prepared: Path, config: Config) -> None:
        self.stored = StoredSessions(prepared)
        self.config = config
        items = read_items(prepared)
        self.items = items.num_rows
        self.available = None
        if self.stored.facts["has_availability"]:
            self.available = items["available_from"].to_numpy(), items["available_until"].to_numpy()
        self.train = self.stored.rows("train")
        validation = self.stored.rows("validation")
        judged = min(_MOST_JUDGED, max(_LEAST_JUDGED, _MOST_SCORES // self.items))
        step = -(-len(validation) // judged)
        self._judged = np.arange(0, len(validation), step)
        counts = items["count"].to_numpy()
        self.popularity = counts / max(counts.max(), 1)

    def judge(self, scorer: Scorer) -> float:
        """NDCG on (a part of) the validation split."""
        table = self.predict(scorer, "validation", self._judged)
        return float(ndcg(ranks_of(table), self.config.task.k).mean())

    def predict(self, scorer: Scorer, split: str, chosen: np.ndarray | None = None) -> pa.Table:
        import torch

        from recipes.recsys.ranking import can_be_listed, rank, rank_rows

        rows = self.stored.rows(split)
        numbers = np.arange(len(rows)) if chosen is None else chosen
        most, length = max(self.stored.facts["most_targets"].values()), self.config.task.list_length
        # Made before: what is kept of each part would lie between the large arrays of the next and hold their memory.
        outputs = {
            "above": np.zeros((len(numbers), most), dtype=np.int64),
            "tied": np.zeros((len(numbers), most), dtype=np.int64),
            "best": np.zeros((len(numbers), length), dtype=np.int64),
            "best_score": np.zeros((len(numbers), length), dtype=np.float32),
        }
        step = rank_rows(self.items)
        for first in range(0, len(numbers), step):
            own = rows[numbers[first : first + step]]
            scores = torch.from_numpy(scorer(own).astype(np.float32))
            targets = torch.from_numpy(self._padded(own[:, FIRST], own[:, STOP], most))
            seen = np.zeros((len(own), 1), dtype=np.int64)
            if self.config.task.mask_seen:
                seen = self._padded(own[:, BEGIN], own[:, FIRST])
            candidates = None
            if self.available is not None:
                moment = self.stored.moment(own)[:, None]
                candidates = torch.from_numpy((self.available[0] <= moment) & (moment < self.available[1]))
            listed = can_be_listed(self.items, targets, torch.from_numpy(seen), candidates)
            ranked = rank(scores, targets, listed, length)
            for kept, part in zip(outputs.values(), ranked, strict=True):
                kept[first : first + step] = part.numpy()
        return make_table(self.stored, split, outputs, self.config, chosen)

    def histories(self, rows: np.ndarray, decay: float) -> sparse.csr_matrix:
        """[rows, items]: the last events of each session, the n-th from the end counting decay to the power of n."""
        begins = np.maximum(rows[:, BEGIN], rows[:, FIRST] - HISTORY)
        row, event = ranges(begins, rows[:, FIRST])
        distance = rows[row, FIRST] - event - 1
        item = np.asarray(self.stored.items[event]) - 1
        shape = (len(rows), self.items)
        return sparse.csr_matrix((decay**distance, (row[item >= 0], item[item >= 0])), shape=shape)

    def users(self) -> sparse.csr_matrix:
        """[users, items]: 1 where a user took the item in the training."""
        row, event = ranges(self.train[:, BEGIN], self.train[:, STOP])
        item = np.asarray(self.stored.items[event]) - 1
        user = self.train[row, USER]
        shape = (int(user.max()) + 1, self.items)
        taken = sparse.csr_matrix((np.ones(len(item), dtype=np.float32), (user, item)), shape=shape)
        taken.data[:] = 1
        return taken

    def recent(self, share: float) -> np.ndarray:
        """Training events of each item in the last part of the training: [items]."""
        _, event = ranges(self.train[:, FIRST], self.train[:, STOP])
        if self.stored.times is not None:
            event = event[np.argsort(np.asarray(self.stored.times[event]), kind="stable")]
        chosen = event[len(event) - round(share * len(event)) :]
        return np.bincount(np.asarray(self.stored.items[chosen]), minlength=self.items + 1)[1:]

    def _padded(self, begins: np.ndarray, ends: np.ndarray, width: int | None = None) -> np.ndarray:
        row, event = ranges(begins, ends)
        padded = np.zeros((len(begins), width or max(1, int((ends - begins).max()))), dtype=np.int64)
        padded[row, event - begins[row]] = self.stored.items[event]
        return padded


def _popularity(world: _World) -> Iterator[Scorer]:
    for share in _WINDOWS:
        yield functools.partial(_alike, world.recent(share))


def _alike(scores: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return np.tile(scores, (len(rows), 1))


def _item_knn(world: _World) -> Iterator[Scorer]:
    taken = world.users()
    count = np.asarray(taken.sum(0)).ravel()
    most = _kept(_NEIGHBOURS, world.items)
    for shrink in _SHRINKS:
        scaled = (taken @ sparse.diags((count + shrink) ** -0.5, dtype=np.float32)).tocsr()
        matrix = sparse.vstack([strongest(block, most) for block in similar(scaled)], format="csr")
        for decay in _DECAYS:
            yield _linear(world, matrix, decay)


def similar(scaled: sparse.csr_matrix) -> Iterator[sparse.csr_matrix]:
    """scaled.T @ scaled without its diagonal, [some items, items] at a time: memory does not grow with the log."""
    of_items = scaled.T.tocsr()
    pairs = np.append(0, np.cumsum(of_items.astype(bool) @ np.diff(scaled.indptr)))
    first = 0
    while first < len(pairs) - 1:
        last = max(first + 1, int(np.searchsorted(pairs, pairs[first] + _BLOCK, side="right")) - 1)
        block = (of_items[first:last] @ scaled).tocoo()
        off = block.row + first != block.col
        yield sparse.csr_matrix((block.data[off], (block.row[off], block.col[off])), shape=block.shape)
        first = last


def _rules(world: _World) -> Iterator[Scorer]:
    events, most = np.asarray(world.stored.items), _kept(_FOLLOWERS, world.items)
    for backward in _BACKWARD:
        blocks, totals = [], []
        for _, block in rule_blocks(events, world.train, world.items, backward):
            totals.append(np.asarray(block.sum(1)).ravel())
            blocks.append(strongest(block, most))
        counted, total = sparse.vstack(blocks, format="csr"), np.maximum(np.concatenate(totals), 1e-9)
        for norm in _NORMS:
            matrix = (sparse.diags(total**-norm) @ counted).tocsr()
            for decay in _DECAYS:
                yield _linear(world, matrix, decay)


def _kept(most: int, items: int) -> int:
    """Of each item."""
    return min(most, max(_LEAST_KEPT, _MOST_ENTRIES // items))


def _ease(world: _World) -> Iterator[Scorer]:
    taken = world.users()
    gram = (taken.T @ taken).toarray().astype(np.float64)
    for ridge in _RIDGES if world.items <= _MOST_CHOSEN_EASE else _RIDGES[1:2]:
        inverse = np.linalg.inv(gram + ridge * np.eye(len(gram)))
        weights = -inverse / np.diag(inverse)
        np.fill_diagonal(weights, 0)
        yield _linear(world, weights, 1.0)


def _linear(world: _World, matrix: Any, decay: float) -> Scorer:
    tie_break = _LEAST * world.popularity

    def score(rows: np.ndarray) -> np.ndarray:
        scores = world.histories(rows, decay) @ matrix
        return (scores.toarray() if sparse.issparse(scores) else scores) + tie_break

    return score


_MADE: dict[str, Callable[[_World], Iterator[Scorer]]] = {
    "popularity": _popularity,
    "item_knn": _item_knn,
    "rules": _rules,
    "ease": _ease,
}
