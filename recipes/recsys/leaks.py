"""Does what comes later reach the training? Each check has a test that plants its leak. Torch-free."""

from __future__ import annotations

import numpy as np

from dist_train.errors import DataError
from recipes.recsys.clock import shown
from recipes.recsys.config import DataConfig
from recipes.recsys.item_table import ItemTable
from recipes.recsys.sessions import BEGIN, FIRST, STOP, USER, Sessions, Split, ranges

# A column of categories with this share of different values names the items.
_IDENTIFYING_SHARE = 0.9
# Rank correlation with what is clicked later, beyond what was clicked before, from which on a number is suspicious.
_SUSPICIOUS = 0.5
_FEWEST_ITEMS = 50


def check_split(sessions: Sessions, split: Split) -> dict[str, int]:
    """Counts for the report. DataError for an event at or after the cut that trains."""
    if split.cuts is not None and sessions.times is not None:
        late = np.flatnonzero(split.trained & (sessions.times >= split.cuts[0]))
        train = split.rows["train"]
        last = int(sessions.times[train[:, STOP] - 1].max())
        if len(late) or last >= split.cuts[0]:
            raise DataError(
                f"{len(late)} events at or after the cut ({shown(split.cuts[0])}) are in the training: the split is "
                "none by time."
            )
    return {
        "sessions_crossing": _crossing(sessions, split),
        "repeat_targets": sum(_repeats(sessions, split.rows[name]) for name in ("validation", "test")),
    }


def check_content(table: ItemTable, counts: np.ndarray, later: np.ndarray, split: Split, data: DataConfig) -> list[str]:
    """Warnings. DataError for content that names the item or was written after the cut.

    counts, later: events of each item in the training and after it.
    """
    for name, column in zip(data.category_columns, table.categories, strict=True):
        given = [value for value in column if value]
        if len(given) >= _FEWEST_ITEMS and len(set(given)) >= _IDENTIFYING_SHARE * len(given):
            raise DataError(
                f"the column {name!r} has {len(set(given)):,} different values for {len(given):,} items: it names the "
                "item, and is no category that a new item could share. Take it out of data.category_columns."
            )
    for name, column in zip(data.text_columns, table.texts, strict=True):
        copies = sum(value == item for value, item in zip(column, table.names, strict=True) if value)
        if copies >= max(1, len(table) // 2):
            raise DataError(
                f"the column {name!r} repeats {data.item_column!r} in {copies:,} of {len(table):,} items: it is a copy "
                "of the id. Take it out of data.text_columns."
            )
    if table.written is not None and split.cuts is not None:
        # An item that nobody has taken by then may well be newer.
        late = np.flatnonzero((table.written >= split.cuts[0]) & (counts > 0))
        if len(late):
            names = ", ".join(repr(table.names[index]) for index in late[:20])
            raise DataError(
                f"the content of {len(late):,} items was written at or after the end of the training "
                f"({shown(split.cuts[0])}), by {data.content_time_column}: {names}. Take the item table as it was then."
            )
    return _suspicious_numbers(table, counts, later, data)


def _suspicious_numbers(table: ItemTable, counts: np.ndarray, later: np.ndarray, data: DataConfig) -> list[str]:
    """Numbers that go with what is clicked after the cut more than what was clicked before explains, such as a sales
    rank of today."""
    from scipy.stats import rankdata

    warnings = []
    for name, column in zip(data.number_columns, table.numbers.T, strict=True):
        known = ~np.isnan(column)
        if known.sum() < _FEWEST_ITEMS:
            continue
        ranks = [rankdata(values[known]) for values in (column, later, counts)]
        value, after, before = (_standardised(rank) for rank in ranks)
        rho = float(np.mean(_beyond(value, before) * _beyond(after, before)))
        if abs(rho) >= _SUSPICIOUS:
            warnings.append(
                f"{name} goes with what is clicked after the end of the training (rank correlation {rho:+.2f} beyond "
                "what was clicked before): look whether it was measured later; if so take it out of data.number_columns"
            )
    return warnings


def _standardised(values: np.ndarray) -> np.ndarray:
    spread = values.std()
    return (values - values.mean()) / spread if spread > 0 else np.zeros(len(values))


def _beyond(values: np.ndarray, other: np.ndarray) -> np.ndarray:
    """What of the standardised values another does not explain, standardised."""
    return _standardised(values - np.mean(values * other) * other)


def _crossing(sessions: Sessions, split: Split) -> int:
    """Rows of validation and test whose user, history and target stand in a training row of their own."""
    if sessions.times is not None:
        return 0  # of events a row is one place in the log, on one side of the cut
    trained = {_row_key(sessions, row) for row in split.rows["train"]}
    others = np.concatenate([split.rows["validation"], split.rows["test"]])
    return sum(_row_key(sessions, row) in trained for row in others)


def _row_key(sessions: Sessions, row: np.ndarray) -> bytes:
    return row[USER].tobytes() + sessions.items[row[BEGIN] : row[STOP]].tobytes()


def _repeats(sessions: Sessions, rows: np.ndarray) -> int:
    """Targets that stand in their own history: their item came in the session before the row's targets."""
    begins = np.unique(rows[:, BEGIN])
    session, event = ranges(begins, sessions.starts[np.searchsorted(sessions.starts, begins, side="right")])
    key = session * (int(sessions.items.max()) + 1) + sessions.items[event]
    _, first, which = np.unique(key, return_index=True, return_inverse=True)
    came_first = np.empty(len(sessions.items), dtype=np.int64)
    came_first[event] = event[first[which]]
    row, target = ranges(rows[:, FIRST], rows[:, STOP])
    return int((came_first[target] < rows[row, FIRST]).sum())
