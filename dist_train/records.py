"""Rows to predict, as the user has them: tables, folders of images, standard input. Torch-free."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dist_train.errors import DataError
from dist_train.table_files import expand_files, read_files

CHUNK_ROWS = 2048
"""Rows that are read, computed and written at once: what a chunk's answers are depends on its own rows alone."""
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")

Record = dict[str, Any]


def read_records(source: str) -> Iterator[list[Record]]:
    """Chunks of the rows of a table file (CSV, TSV, JSONL, Parquet; a glob, a folder of them), or of the images below
    a folder as {"id": path below it, "path": where it lies}. DataError for what is neither, or is damaged."""
    folder = Path(source)
    images = _images(folder) if folder.is_dir() else []
    if images:
        yield from chunks_of({"id": str(path.relative_to(folder)), "path": str(path)} for path in images)
        return
    files = expand_files(source, "the input")
    yield from chunks_of(itertools.chain.from_iterable(read_files(files)))


def chunks_of(records: Iterable[Record]) -> Iterator[list[Record]]:
    iterator = iter(records)
    while chunk := list(itertools.islice(iterator, CHUNK_ROWS)):
        yield chunk


def check_record(record: Record, columns: Iterable[str]) -> None:
    """DataError for a column that the model was trained on and the row lacks."""
    for name in columns:
        if name not in record:
            raise DataError(
                f"a row to predict has no column {name!r}, which the model was trained on. "
                f"Columns that it has: {', '.join(record)}."
            )


def _images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
