"""Read the user's tables in batches: CSV, TSV, JSONL and Parquet (gz too), and folders of Parquet. Torch-free.

Strict: whatever is wrong is named with its file and line, before anything is built on it.
"""

from __future__ import annotations

import csv
import difflib
import glob
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote

from dist_train.errors import DataError

Batch = list[dict[str, Any]]
_BATCH_ROWS = 10_000
_KINDS = {".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
# A field longer than this is a quote that was never closed, not a value.
_MOST_CHARACTERS = 10_000_000
# What Hive calls a missing value in a folder's name.
_NO_VALUE = "__HIVE_DEFAULT_PARTITION__"


@dataclass(frozen=True)
class TableFile:
    """A file of rows, on its own or below a folder."""

    path: Path
    folder: Path | None = None
    """The folder that was named, where the file was found below one."""

    def partition(self) -> dict[str, str | None]:
        """Columns that the folders between say for every row of the file: `year=2026/queue=a/` (Hive's way)."""
        parts = self.path.relative_to(self.folder).parent.parts if self.folder else ()
        pairs = (unquote(part).partition("=") for part in parts if "=" in part)
        return {name: None if value == _NO_VALUE else value for name, _, value in pairs}

    def num_rows(self) -> int | None:
        """Rows, where the file says so itself (Parquet)."""
        return None if _kind(self.path) != "parquet" else _open_parquet(self.path).metadata.num_rows


def expand_files(paths: str | Sequence[str], key: str) -> list[TableFile]:
    """The files of a path, a list of paths, a glob, or a folder with *.parquet below. DataError when one is missing or
    empty. Each kind is in sorted order, so that the rows always come in the same one."""
    files: list[TableFile] = []
    for word in [paths] if isinstance(paths, str) else paths:
        pattern = any(sign in word for sign in "*?[") and not os.path.exists(word)
        matches = sorted(glob.glob(word, recursive=True)) if pattern else [word]
        if not matches:
            raise DataError(f"{key} is {word}, but no file matches it.")
        for match in map(Path, matches):
            below = _parquet_below(match) if match.is_dir() else []
            files.extend([TableFile(path, match) for path in below] or [TableFile(match)])
    for file in files:
        try:
            _check_file(file.path, key)
            with open(file.path, "rb"):
                pass
        except OSError as error:
            raise DataError(f"{key} is {file.path}, which cannot be read: {error.strerror}.") from error
    return files


def _parquet_below(folder: Path) -> list[Path]:
    """What writers of data sets leave beside the data (_SUCCESS, .crc) begins with these signs."""
    found = (path for path in folder.rglob("*.parquet") if path.is_file())
    return sorted(path for path in found if not any(part[0] in "._" for part in path.relative_to(folder).parts))


def _check_file(file: Path, key: str) -> None:
    if not file.exists():
        near = difflib.get_close_matches(file.name, [p.name for p in _siblings(file) if p.exists()], n=1)
        hint = f" Did you mean {file.parent / near[0]}?" if near else ""
        raise DataError(f"{key} is {file}, but there is no such file.{hint}")
    if not file.is_file() and not file.is_dir():
        raise DataError(f"{key} is {file}, which is no regular file: copy its content into one.")
    if file.is_dir():
        raise DataError(
            f"{key} is {file}, a folder that `datasets` did not save and that has no *.parquet below: name files, "
            f"for example {file}/*.csv"
        )
    if file.stat().st_size == 0:
        raise DataError(f"{file} is empty ({key}): it needs a header and rows below it.")
    if _kind(file) is None:
        allowed = ", ".join(sorted(_KINDS))
        raise DataError(f"{file} ({key}) has an ending that is not known; allowed: {allowed}, also with .gz behind.")


def _siblings(file: Path) -> list[Path]:
    return list(file.parent.iterdir()) if file.parent.is_dir() else []


def _kind(file: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return _KINDS.get(suffixes[-1]) if suffixes else None


def read_files(files: Iterable[TableFile], columns: Mapping[str, str] | None = None) -> Iterator[Batch]:
    """Batches of rows as {column: value}, only the named columns; all of them for None. Values are text, or None.

    columns: the column's name -> the config key that names it, for messages.
    """
    for file in files:
        kind = _kind(file.path)
        if kind == "parquet":
            yield from _read_parquet(file, columns)
            continue
        with _open_text(file.path) as stream:
            try:
                if kind == "jsonl":
                    yield from _batched(_read_jsonl(file.path, stream, columns))
                else:
                    yield from _batched(_read_csv(file.path, stream, "\t" if kind == "tsv" else ",", columns))
            except UnicodeDecodeError:
                raise _bad_utf8(file.path, kind or "csv") from None
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                raise DataError(f"{file.path} is no whole gzip file: {error}. Copy or compress it again.") from error


def _open_text(file: Path) -> IO[str]:
    raw: Any = gzip.open(file, "rb") if file.suffix.lower() == ".gz" else open(file, "rb")  # noqa: SIM115 - the caller closes it
    return io.TextIOWrapper(raw, encoding="utf-8-sig", newline="")


def _batched(rows: Iterable[dict[str, Any]]) -> Iterator[Batch]:
    batch: Batch = []
    for row in rows:
        batch.append(row)
        if len(batch) == _BATCH_ROWS:
            yield batch
            batch = []
    if batch:
        yield batch


def _read_csv(
    file: Path, stream: IO[str], delimiter: str, columns: Mapping[str, str] | None
) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(_MOST_CHARACTERS)
    reader = csv.reader(stream, delimiter=delimiter, strict=True)
    try:
        header = next(record for record in reader if record)
    except StopIteration:
        raise DataError(f"{file} is empty: it needs a header line.") from None
    except csv.Error as error:
        raise DataError(f"{file}: the header: {error}. Look for a quote that is not closed.") from error
    places = {name: index for index, name in enumerate(header)}
    check_columns(file, header, dict.fromkeys(header, "the header") if columns is None else columns)
    wanted = [(name, places[name]) for name in columns or header]
    count, line = 0, reader.line_num + 1
    try:
        for record in reader:
            if not record:
                line = reader.line_num + 1
                continue  # a blank line, as editors leave at the end
            if len(record) != len(header):
                raise DataError(
                    f"{file}:{line}: this record has {len(record)} fields, but the header has {len(header)}. "
                    "A delimiter inside a field needs quotes around the field."
                )
            count += 1
            line = reader.line_num + 1
            yield {name: record[index] for name, index in wanted}
    except csv.Error as error:
        raise DataError(f"{file}:{line}: {error}. Look for a quote that is not closed.") from error
    if count == 0:
        raise DataError(f"{file} has a header, but no rows below it.")


def _read_jsonl(file: Path, stream: IO[str], columns: Mapping[str, str] | None) -> Iterator[dict[str, Any]]:
    count = 0
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # ValueError: no JSON, or a number of thousands of digits
            raise DataError(f"{file}:{number}: this line is no JSON: {error}.") from error
        if not isinstance(record, dict):
            raise DataError(f"{file}:{number}: a line must be a JSON object, but this is {type(record).__name__}.")
        if columns is not None and not columns.keys() <= record.keys():
            check_columns(Path(f"{file}:{number}"), list(record), columns)
        count += 1
        row = {name: as_text(record[name]) for name in columns or record}
        try:
            "".join(value or "" for value in row.values()).encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{file}:{number}: an escape in this line is half a character: {error}.") from error
        yield row
    if count == 0:
        raise DataError(f"{file} has no rows in it.")


def _read_parquet(file: TableFile, columns: Mapping[str, str] | None) -> Iterator[Batch]:
    import pyarrow as pa

    parquet, partition = _open_parquet(file.path), file.partition()
    own = parquet.schema_arrow.names
    existing = [*(name for name in own if name not in partition), *partition]
    check_columns(file.path, existing, columns or {})
    wanted = list(columns or existing)
    if parquet.metadata.num_rows == 0 and file.folder is None:  # below a folder an empty part is nothing special
        raise DataError(f"{file.path} has no rows in it.")
    try:
        for batch in parquet.iter_batches(_BATCH_ROWS, columns=[name for name in wanted if name not in partition]):
            rows = batch.to_pylist()
            yield [{name: as_text(row[name]) if name in row else partition[name] for name in wanted} for row in rows]
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file.path} is damaged: {error}. Copy or write it again.") from error


def _open_parquet(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is no Parquet file: {error}") from error


def check_columns(where: Path | str, existing: Sequence[str], columns: Mapping[str, str]) -> None:
    """DataError for the first column that is not there, with those that are, or that is there twice."""
    for name, key in columns.items():
        if list(existing).count(name) > 1:
            raise DataError(f"{where} has several columns {name!r} ({key}): give each its own name.")
        if name not in existing:
            near = difflib.get_close_matches(name, list(existing), n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            if len(existing) == 1 and any(sign in existing[0] for sign in ";\t|"):
                hint = " Its columns are not separated by commas: write it with commas, or with tabs as .tsv."
            raise DataError(
                f"{where} has no column {name!r}.{hint} Columns that exist: {', '.join(existing)}. Change {key}."
            )


def as_text(value: Any) -> str | None:
    """Text as the readers give it; a missing value is None, also as NaN."""
    if value is None or value != value:
        return None
    return value if value is None or isinstance(value, str) else str(value)


def _bad_utf8(file: Path, kind: str) -> DataError:
    """Where the first byte lies that is not UTF-8: line, and record where a record may span lines."""
    opened: Any = gzip.open(file, "rb") if file.suffix.lower() == ".gz" else open(file, "rb")  # noqa: SIM115 - closed below
    with opened as stream:
        data = stream.read()
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        record = line - 1
        if kind in ("csv", "tsv"):
            # The sign stands for the bad byte, which may be the first of its record.
            before = io.StringIO(data[: error.start].decode("utf-8") + "?", newline="")
            record = max(0, sum(1 for row in csv.reader(before, delimiter="\t" if kind == "tsv" else ",") if row) - 1)
        # Windows' "Unicode" begins with these bytes; the usual other encoding is Latin-1.
        encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "latin1"
        where = f"record {record}" if kind != "jsonl" else f"record {line}"
        return DataError(
            f"{file}: {where}, line {line}: byte 0x{data[error.start]:02x} is no valid UTF-8.\n"
            f"If the file is in another encoding, convert it: iconv -f {encoding} -t utf-8 {file.name}"
        )
    raise AssertionError("called for a file that is UTF-8")
