"""Rows to predict, as the user has them: tables, folders of images, standard input. Torch-free."""

from __future__ import annotations

import itertools
import os
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from dist_train.errors import DataError
from dist_train.image_files import images_below
from dist_train.table_files import TableFile, expand_files, read_files

CHUNK_ROWS = 2048
"""Most rows that are read, computed and written at once: what a chunk's answers are depends on its own rows alone."""

Record = dict[str, Any]


def read_records(
    source: str, file_columns: Collection[str] = (), root: str | None = None, chunk_rows: int = CHUNK_ROWS
) -> Iterator[list[Record]]:
    """Chunks of the rows of a table file (CSV, TSV, JSONL, Parquet; a glob, a folder of them), or of the images below
    a folder as {"id": path below it, "path": where it lies}. DataError for what is neither, or is damaged.

    file_columns: those that name files, relative to the table's folder, or to `root`.
    """
    images = images_below(source)[0] if os.path.isdir(source) else []
    if images:
        yield from chunks_of(({"id": name, "path": os.path.join(source, name)} for name in images), chunk_rows)
        return
    yield from chunks_of(_rows(expand_files(source, "the input"), file_columns, root), chunk_rows)


def _rows(files: Iterable[TableFile], file_columns: Collection[str], root: str | None) -> Iterator[Record]:
    for file in files:
        folder = file.path.parent if root is None else root
        for record in itertools.chain.from_iterable(read_files([file])):
            named = {name: record[name].strip() for name in file_columns if isinstance(record.get(name), str)}
            yield record | {name: os.path.join(folder, value) for name, value in named.items() if value}


def chunks_of(records: Iterable[Record], chunk_rows: int = CHUNK_ROWS) -> Iterator[list[Record]]:
    iterator = iter(records)
    while chunk := list(itertools.islice(iterator, chunk_rows)):
        yield chunk


def check_record(record: Record, columns: Iterable[str]) -> None:
    """DataError for a column that the model was trained on and the row lacks."""
    for name in columns:
        if name not in record:
            raise DataError(
                f"a row to predict has no column {name!r}, which the model was trained on. "
                f"Columns that it has: {', '.join(record)}."
            )
