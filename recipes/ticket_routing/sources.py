"""Where the tickets come from: files, a `datasets` folder or hub data set, or the generator."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from dist_train.errors import ConfigError, DataError
from dist_train.hub import is_offline
from recipes.ticket_routing import read, split, synthetic
from recipes.ticket_routing.config import DataConfig


@dataclass(frozen=True)
class Source:
    """One place that rows come from."""

    split: str | None
    """Name of the split that all its rows belong to; None where the toolkit splits."""
    where: str
    batches: Callable[[dict[str, str]], Iterator[read.Batch]]
    fingerprint: dict[str, Any]


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
        return [Source(None, "synthetic", lambda columns: _generated(data, columns), described)]
    splits = read.open_dataset(data.path, data.revision, is_offline(data)) if isinstance(data.path, str) else None
    if splits is None:
        return None
    # A lone split, most often "train", is no split: the toolkit makes one.
    return [_dataset_source(name if len(splits) > 1 else "", part, data) for name, part in splits.items()]


def _generated(data: DataConfig, columns: dict[str, str]) -> Iterator[read.Batch]:
    read.check_columns("synthetic", [data.text_columns[0], data.label_column], columns)
    for batch in synthetic.generate(data.synthetic, data.rows):
        yield [{data.text_columns[0]: row["text"], data.label_column: row["label"]} for row in batch]


def _dataset_source(name: str, dataset: Any, data: DataConfig) -> Source:
    where = f"{data.path}{f' ({name})' if name else ''}"
    own = None
    if name:
        if name not in split.WORDS:
            raise DataError(f"{where}: the split {name!r} is not known; allowed are train, validation and test.")
        own = split.NAMES[split.WORDS[name]]
    described = {
        "dataset": str(data.path),
        "revision": read.resolved_revision(dataset),
        "fingerprint": str(dataset._fingerprint),
        "rows": len(dataset),
        "split": name,
    }
    return Source(own, where, lambda columns: read.read_dataset(dataset, where, columns), described)


def _file_source(paths: str | list[str], key: str, name: str | None) -> Source:
    files = read.expand_files(paths, key)
    described = []
    for file in files:
        with open(file, "rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        described.append({"path": str(file), "bytes": file.stat().st_size, "sha256": digest})
    where = str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
    return Source(name, where, lambda columns: read.read_files(files, columns), {"files": described, "split": name})
