"""Where the tickets come from: files, a `datasets` folder or hub data set, or the generator; in chunks."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from dist_train import datasets_source
from dist_train.errors import ConfigError, DataError
from dist_train.hub import is_offline
from dist_train.table_files import Batch, TableFile, check_columns, expand_files, read_files
from recipes.ticket_routing import split, synthetic
from recipes.ticket_routing.chunks import CHUNK_ROWS, Chunk, packed
from recipes.ticket_routing.config import DataConfig

# What a ticket takes on the disk beside its text: signatures, tokens, its place in the split, and buckets meanwhile.
_BYTES_A_ROW = 250
_SYNTHETIC_TEXT = 130


@dataclass(frozen=True)
class Source:
    """One place that rows come from."""

    split: str | None
    """Name of the split that all its rows belong to; None where the toolkit splits."""
    where: str
    chunks: Callable[[dict[str, str]], Iterator[Chunk]]
    """Its rows in order. Columns: name -> the key that names it."""
    fingerprint: dict[str, Any]
    bytes_needed: int
    """About what its prepared rows take on the disk."""


def find_sources(data: DataConfig) -> list[Source]:
    """Every place that rows come from, with what tells its content from another. ConfigError, DataError."""
    if data.path is None:
        raise ConfigError(
            "data.path is not set: name your tickets, for example\n"
            "  data.path=tickets.csv data.text_columns=[subject,body] data.label_column=queue\n"
            "To try the toolkit on generated tickets: dist-train run ticket_routing/demo"
        )
    if data.label_column in data.text_columns:
        raise ConfigError(
            f"data.label_column is {data.label_column!r}, which is one of data.text_columns too: "
            "the model would read the answer. Leave it out of data.text_columns."
        )
    whole = _whole_sources(data)
    if whole is not None:
        for key in ("validation_path", "test_path"):
            if getattr(data, key) is not None:
                raise ConfigError(f"data.{key} goes with files only, but data.path is {data.path}: set it to null.")
        return whole
    sources = [_file_source(data.path, "data.path", None if data.test_path is None else "train")]
    for paths, key, name in (
        (data.validation_path, "data.validation_path", "validation"),
        (data.test_path, "data.test_path", "test"),
    ):
        if paths is not None:
            sources.append(_file_source(paths, key, name))
    return sources


def _whole_sources(data: DataConfig) -> list[Source] | None:
    """The source of generated tickets, or those of a `datasets` folder or hub data set; None for files."""
    if data.path == "synthetic":
        described = {"synthetic": synthetic.VERSION, "rows": data.rows, **data.synthetic.model_dump()}
        needed = data.rows * (_SYNTHETIC_TEXT + _BYTES_A_ROW)
        return [Source(None, "synthetic", lambda columns: _generated(data, columns), described, needed)]
    splits = (
        datasets_source.open_dataset(data.path, data.revision, is_offline(data)) if isinstance(data.path, str) else None
    )
    if splits is None:
        return None
    # A lone split, most often "train", is no split: the toolkit makes one.
    return [_dataset_source(name if len(splits) > 1 else "", part, data) for name, part in splits.items()]


def _generated(data: DataConfig, columns: dict[str, str]) -> Iterator[Chunk]:
    text, label = data.text_columns[0], data.label_column
    check_columns("synthetic", [text, label], columns)
    for start in range(0, data.rows, CHUNK_ROWS):
        stop = min(start + CHUNK_ROWS, data.rows)
        content = ["synthetic", synthetic.VERSION, data.synthetic.model_dump(), start, stop]
        yield Chunk(content, functools.partial(_generate, data, start, stop), stop - start)


def _generate(data: DataConfig, start: int, stop: int) -> pa.Table:
    texts, labels = zip(*synthetic.generate(data.synthetic, start, stop), strict=True)
    return pa.table({data.text_columns[0]: texts, data.label_column: labels})


def _dataset_source(name: str, dataset: Any, data: DataConfig) -> Source:
    where = f"{data.path}{f' ({name})' if name else ''}"
    own = None
    if name:
        if name not in split.WORDS:
            raise DataError(f"{where}: the split {name!r} is not known; allowed are train, validation and test.")
        own = split.NAMES[split.WORDS[name]]
    described = {
        "dataset": str(data.path),
        "revision": datasets_source.resolved_revision(dataset),
        "fingerprint": str(dataset._fingerprint),
        "rows": len(dataset),
        "split": name,
    }
    needed = (dataset.info.dataset_size or dataset.data.nbytes) + len(dataset) * _BYTES_A_ROW

    def chunks(columns: dict[str, str]) -> Iterator[Chunk]:
        return _packed(datasets_source.read_dataset(dataset, where, columns), list(columns))

    return Source(own, where, chunks, described, needed)


def _file_source(paths: str | list[str], key: str, name: str | None) -> Source:
    files = expand_files(paths, key)
    described, needed = [], 0
    for file in files:
        stat, rows = file.path.stat(), file.num_rows()
        digest = _digest(file.path, stat.st_size, stat.st_mtime_ns)
        described.append({"path": str(file.path), "bytes": stat.st_size, "sha256": digest})
        if file.partition():
            described[-1]["partition"] = file.partition()
        if rows is None:
            # Text comes to about twice its size; archives are a quarter of it.
            needed += stat.st_size * (8 if file.path.suffix.lower() == ".gz" else 2)
        else:
            needed += 3 * stat.st_size + rows * _BYTES_A_ROW
    where = str(files[0].path) if len(files) == 1 else f"{files[0].path} and {len(files) - 1} more"
    fingerprint = {"files": described, "split": name}
    return Source(name, where, lambda columns: _file_chunks(files, columns), fingerprint, needed)


def _file_chunks(files: list[TableFile], columns: dict[str, str]) -> Iterator[Chunk]:
    """No chunk spans two files, so that a new file, wherever it is sorted in, leaves the chunks of the others."""
    for file in files:
        yield from _packed(read_files([file], columns), list(columns))


def _packed(batches: Iterable[Batch], columns: list[str]) -> Iterator[Chunk]:
    rows: Batch = []
    for batch in batches:
        rows += batch
        while len(rows) >= CHUNK_ROWS:
            yield packed(rows[:CHUNK_ROWS], columns)
            rows = rows[CHUNK_ROWS:]
    if rows:
        yield packed(rows, columns)


@functools.lru_cache(maxsize=100_000)
def _digest(path: Path, size: int, changed: int) -> str:
    """sha256 of a file, read once in this process unless it changes."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
