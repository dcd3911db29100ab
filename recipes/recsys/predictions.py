"""The table of kept predictions, a line a session: where its targets stood, and the list it was given. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from recipes.recsys.clock import DAY_MS
from recipes.recsys.config import Config
from recipes.recsys.data import about_loss
from recipes.recsys.sessions import BEGIN, FIRST, STOP, USER, ranges
from recipes.recsys.stored import StoredSessions, read_items


@dataclass(frozen=True)
class Header:
    """What the table's metadata says of all its rows."""

    k: int
    items: int
    """In the catalogue."""
    events: int
    """Of the training."""
    period_days: float
    loss: str = ""
    """That of the training, in words."""


def make_table(
    stored: StoredSessions,
    split: str,
    outputs: Mapping[str, np.ndarray],
    config: Config,
    chosen: np.ndarray | None = None,
) -> pa.Table:
    """outputs: above and tied [rows, targets], best and best_score [rows, list]; items from 1, 0 for none. chosen: the
    rows of the split that they are of; None: all."""
    rows = stored.rows(split) if chosen is None else stored.rows(split)[chosen]
    sizes = rows[:, STOP] - rows[:, FIRST]
    offsets = pa.array(np.append(0, np.cumsum(sizes)).astype(np.int32))
    filled = np.arange(outputs["above"].shape[1]) < sizes[:, None]
    targets = stored.items[ranges(rows[:, FIRST], rows[:, STOP])[1]]
    folder = stored.folder
    counts = np.append(0, read_items(folder)["count"].to_numpy())

    def lists(values: np.ndarray) -> pa.ListArray:
        return pa.ListArray.from_arrays(offsets, pa.array(values))

    def fixed(values: np.ndarray, kind: Any) -> pa.FixedSizeListArray:
        return pa.FixedSizeListArray.from_arrays(pa.array(values.astype(kind).reshape(-1)), values.shape[1])

    table = pa.table(
        {
            "row": np.arange(len(rows)) if chosen is None else chosen,
            "user": stored.user_names.take(pa.array(rows[:, USER])),
            "age_days": _age_days(stored, rows),
            "history": (rows[:, FIRST] - rows[:, BEGIN]).astype(np.int32),
            "is_known_user": known_users(stored)[rows[:, USER]],
            "target": lists(targets.astype(np.int32)),
            "target_count": lists(counts[targets]),
            "above": lists(outputs["above"][filled].astype(np.int64)),
            "tied": lists(outputs["tied"][filled].astype(np.int64)),
            "best": fixed(outputs["best"], np.int32),
            "best_score": fixed(outputs["best_score"], np.float32),
            "best_count": fixed(counts[outputs["best"].astype(np.int64)], np.int64),
        }
    )
    loss = about_loss(config, stored.facts["trained_items"])
    header = Header(config.task.k, len(counts) - 1, int(counts.sum()), config.data.period_days, loss)
    return table.replace_schema_metadata({b"header": json.dumps(asdict(header)).encode()})


def header_of(table: pa.Table) -> Header:
    return Header(**json.loads(table.schema.metadata[b"header"]))


def fixed_lists(table: pa.Table, name: str) -> np.ndarray:
    """A column of lists of one length as an array [rows, length]."""
    lists = table[name].combine_chunks()
    return lists.values.to_numpy(zero_copy_only=False).reshape(-1, lists.type.list_size)


def ragged(table: pa.Table, name: str) -> tuple[np.ndarray, np.ndarray]:
    """A column of lists: all values, and the row of each."""
    column = table[name].combine_chunks()
    sizes = np.diff(column.offsets.to_numpy())
    return column.flatten().to_numpy(zero_copy_only=False), np.repeat(np.arange(len(sizes)), sizes)


def known_users(stored: StoredSessions) -> np.ndarray:
    """[users] bool: those with a target in the training."""
    known = np.zeros(stored.facts["users"], dtype=bool)
    known[stored.rows("train")[:, USER]] = True
    return known


def _age_days(stored: StoredSessions, rows: np.ndarray) -> pa.Array:
    """Days since the end of the training; null where there are no times."""
    cuts = stored.facts["cuts"]
    if cuts is None:
        return pa.nulls(len(rows), pa.float64())
    return pa.array((stored.moment(rows) - cuts[0]) / DAY_MS)
