"""What a table file looks like, column by column: for a starter that fits it. Torch-free."""

from __future__ import annotations

import collections
import itertools
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime

from dist_train.table_files import expand_files, read_files

MOST_ROWS = 200_000
"""As many rows are looked at."""
_KEPT_VALUES = 20_000  # distinct values that are counted one by one


@dataclass(frozen=True)
class Column:
    name: str
    filled_share: float
    """Share of the rows with a value."""
    distinct: int
    """Different values."""
    counts: Mapping[str, int]
    """Rows of each value, the commonest first; of an unlimited column the first ones that were seen."""
    mean_words: float
    number_share: float
    """Share of the values that are numbers."""
    time_share: float
    """Share of the values that are times as ISO 8601 writes them."""

    def is_unique(self) -> bool:
        return self.filled_share == 1.0 and self.distinct == self.rows

    rows: int = 0


@dataclass(frozen=True)
class FileProfile:
    rows: int
    is_whole: bool
    """Whether these are all rows of the file."""
    columns: tuple[Column, ...]

    def column(self, name: str) -> Column | None:
        return next((column for column in self.columns if column.name == name), None)


def profile_file(path: str) -> FileProfile:
    """Look at the first MOST_ROWS rows of a CSV, TSV, JSONL or Parquet file. DataError when it is none."""
    rows = itertools.chain.from_iterable(read_files(expand_files(path, "--data")))
    seen = list(itertools.islice(rows, MOST_ROWS))
    is_whole = next(rows, None) is None
    names = list(seen[0])
    return FileProfile(len(seen), is_whole, tuple(_column(name, [row.get(name) for row in seen]) for name in names))


def _column(name: str, values: list[str | None]) -> Column:
    filled = [value.strip() for value in values if value is not None and value.strip()]
    counts = collections.Counter(filled)
    sample = filled[:_KEPT_VALUES]
    return Column(
        name,
        len(filled) / len(values),
        len(counts),
        dict(counts.most_common(_KEPT_VALUES)),
        statistics.fmean(len(value.split()) for value in sample) if sample else 0.0,
        _share(_is_number(value) for value in sample),
        _share(_is_time(value) for value in sample),
        len(values),
    )


def _share(hits: Iterable[bool]) -> float:
    listed = list(hits)
    return sum(listed) / len(listed) if listed else 0.0


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


def _is_time(value: str) -> bool:
    if len(value) < 8 or _is_number(value):
        return False
    try:
        datetime.fromisoformat(value)
    except ValueError:
        return False
    return True
