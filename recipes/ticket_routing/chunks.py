"""Chunks of up to CHUNK_ROWS tickets: validated and signed, then tokenised. Each is kept by content and made once.

A chunk folder holds text.arrow (id, text) and one array a file; a token folder ids.npy and offsets.npy.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import secrets
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dist_train.errors import DataError
from dist_train.prepared import commit, is_whole
from recipes.ticket_routing import split
from recipes.ticket_routing.config import DataConfig
from recipes.ticket_routing.duplicates import sign

CHUNK_ROWS = 50_000
# Changes whenever the same rows would be kept, signed or tokenised differently.
VERSION = 1
_STALE_S = 24 * 3600
_TOKENISED_AT_ONCE = 5_000


@dataclass(frozen=True)
class Columns:
    """Which columns hold what."""

    text: tuple[str, ...]
    label: str
    id: str | None
    time: str | None
    """Times order the rows; None where they are not asked for."""
    split: str | None

    @staticmethod
    def of(data: DataConfig, timed: bool) -> Columns:
        time_column = data.time_column if timed else None
        return Columns(tuple(data.text_columns), data.label_column, data.id_column, time_column, data.split_column)


@dataclass(frozen=True)
class Chunk:
    """Rows that are not validated yet."""

    content: Any
    """What tells them from others: a hash, or how they are generated."""
    make: Callable[[], pa.Table]
    """All their columns, as text; runs in a worker."""
    rows: int


def packed(rows: list[dict[str, str | None]], columns: list[str]) -> Chunk:
    """A chunk of rows that were read here."""
    table = pa.table({name: pa.array([row[name] for row in rows], pa.large_string()) for name in columns})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    data = sink.getvalue().to_pybytes()
    digest = hashlib.sha256(json.dumps([list(row.values()) for row in rows]).encode()).hexdigest()
    return Chunk(digest, functools.partial(_unpacked, data), len(rows))


def _unpacked(data: bytes) -> pa.Table:
    return pa.ipc.open_stream(data).read_all()


def chunk_folder(root: Path, chunk: Chunk, columns: Columns) -> Path:
    described = json.dumps([VERSION, chunk.content, asdict(columns)], sort_keys=True)
    return root / f"rows-{hashlib.sha256(described.encode()).hexdigest()[:32]}"


def store(folder: Path, chunk: Chunk, columns: Columns, where: str, first_row: int) -> None:
    """Validate and sign the rows of a chunk. first_row: their place in the source, for messages. DataError."""
    if is_whole(folder):
        return
    table = chunk.make()
    labels = _labels(table, columns, where, first_row)
    texts = _texts(table, columns)
    kept = [index for index, text in enumerate(texts) if text]
    names = sorted({labels[index] for index in kept})
    code = {name: index for index, name in enumerate(names)}
    ids = table[columns.id].to_pylist() if columns.id else []
    arrays: dict[str, np.ndarray] = {
        "rows": np.array(kept, dtype=np.int32),
        "labels": np.array([code[labels[index]] for index in kept], dtype=np.int32),
    }
    if columns.time is not None:
        times, numbers = table[columns.time].to_pylist(), [first_row + index for index in kept]
        arrays["times"] = split.parse_times([times[index] for index in kept], numbers, where)
    if columns.split is not None:
        parts, numbers = table[columns.split].to_pylist(), [first_row + index for index in kept]
        arrays["splits"] = split.by_column([parts[index] for index in kept], numbers, where)
    text = [texts[index] for index in kept]
    stored = pa.table(
        {
            "id": pa.array([str(ids[index]) if ids else None for index in kept], pa.large_string()),
            "text": pa.array(text, pa.large_string()),
        }
    )
    arrays |= vars(sign(text))
    temporary = _temporary(folder)
    try:
        with pa.OSFile(str(temporary / "text.arrow"), "wb") as sink, pa.ipc.new_stream(sink, stored.schema) as writer:
            writer.write_table(stored)
        for name, values in arrays.items():
            np.save(temporary / f"{name}.npy", values)
        commit(temporary, folder, {"read": len(texts), "rows": len(kept), "labels": names})
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _labels(table: pa.Table, columns: Columns, where: str, first_row: int) -> list[str]:
    labels = [(label or "").strip() for label in table[columns.label].to_pylist()]
    if "" in labels:
        row = first_row + labels.index("")
        raise DataError(f"{where}: row {row} has no label in {columns.label!r}. Fill it in, or leave the row out.")
    return labels


def _texts(table: pa.Table, columns: Columns) -> list[str]:
    parts = zip(*(table[name].to_pylist() for name in columns.text), strict=True)
    return [join_text(row) for row in parts]


def tokenise(chunk: Path, tokenizer_file: Path, folder: Path) -> None:
    """Token ids of a chunk's texts, as one flat array and where each text begins."""
    if is_whole(folder):
        return
    texts = read_texts(chunk)["text"]
    tokenizer = _tokenizer(tokenizer_file, tokenizer_file.stat().st_mtime_ns)
    parts: list[np.ndarray] = []
    offsets = np.zeros(len(texts) + 1, dtype=np.int64)
    # Two bytes an id where the vocabulary allows.
    kind = np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.uint32
    for start in range(0, len(texts), _TOKENISED_AT_ONCE):
        encoded = tokenizer.encode_batch_fast(texts[start : start + _TOKENISED_AT_ONCE].to_pylist())
        # A text of unknown signs alone may come out empty; the model needs one token.
        ids = [encoding.ids or [1] for encoding in encoded]
        offsets[start + 1 : start + 1 + len(ids)] = [len(row) for row in ids]
        parts.append(np.fromiter((token for row in ids for token in row), dtype=kind))
    np.cumsum(offsets, out=offsets)
    temporary = _temporary(folder)
    try:
        np.save(temporary / "ids.npy", np.concatenate(parts) if parts else np.zeros(0, dtype=kind))
        np.save(temporary / "offsets.npy", offsets)
        commit(temporary, folder, {})
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@functools.lru_cache(maxsize=1)
def _tokenizer(file: Path, changed: int) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(file))


def read_texts(folder: Path) -> pa.Table:
    """id and text of a chunk's rows, over a memory map."""
    return open_texts(folder / "text.arrow")


def open_texts(file: Path) -> pa.Table:
    with pa.memory_map(str(file)) as source:
        return pa.ipc.open_stream(source).read_all()


def _temporary(folder: Path) -> Path:
    temporary = folder.with_name(f".tmp-{secrets.token_hex(6)}")
    temporary.mkdir()
    return temporary


def remove_stale(root: Path) -> None:
    """What killed workers left a day ago and more."""
    for path in root.glob(".tmp-*"):
        try:
            if path.stat().st_mtime < time.time() - _STALE_S:
                shutil.rmtree(path, ignore_errors=True)
        except OSError:
            continue  # its owner has just finished it


def size_of(root: Path) -> int:
    """Bytes of the chunks that are there. Others may be made, or given their names, meanwhile."""
    total = 0
    for file in root.glob("[!.]*/*"):
        with contextlib.suppress(OSError):
            total += file.stat().st_size
    return total


def join_text(parts: Iterable[str | None]) -> str:
    """The ticket's text, as the model reads it, from its text columns."""
    return "\n".join(part or "" for part in parts).strip()
