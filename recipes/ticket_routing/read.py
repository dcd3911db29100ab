"""Read the user's tickets in batches: CSV, TSV, JSONL, Parquet (gz too), a `datasets` folder or a hub data set.

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
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from dist_train.errors import ConfigError, DataError
from dist_train.hub import check_reachable

Batch = list[dict[str, Any]]
_BATCH_ROWS = 10_000
_KINDS = {".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
# A field longer than this is a quote that was never closed, not a ticket.
_MOST_CHARACTERS = 10_000_000


def expand_files(paths: str | Sequence[str], key: str) -> list[Path]:
    """The files of a path, a list of paths or a glob. DataError when one is missing or empty."""
    files: list[Path] = []
    for word in [paths] if isinstance(paths, str) else paths:
        pattern = any(sign in word for sign in "*?[") and not os.path.exists(word)
        matches = sorted(glob.glob(word)) if pattern else [word]
        if not matches:
            raise DataError(f"{key} is {word}, but no file matches it.")
        files.extend(Path(match) for match in matches)
    for file in files:
        try:
            _check_file(file, key)
            with open(file, "rb"):
                pass
        except OSError as error:
            raise DataError(f"{key} is {file}, which cannot be read: {error.strerror}.") from error
    return files


def _check_file(file: Path, key: str) -> None:
    if not file.exists():
        near = difflib.get_close_matches(file.name, [p.name for p in _siblings(file) if p.exists()], n=1)
        hint = f" Did you mean {file.parent / near[0]}?" if near else ""
        raise DataError(f"{key} is {file}, but there is no such file.{hint}")
    if not file.is_file() and not file.is_dir():
        raise DataError(f"data.path is {file}, which is no regular file: copy its content into one.")
    if file.is_dir():
        raise DataError(f"{key} is {file}, a folder that `datasets` did not save: name files, for example {file}/*.csv")
    if file.stat().st_size == 0:
        raise DataError(f"{file} is empty ({key}): it needs a header and at least one ticket of each of two queues.")
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


def read_files(files: Iterable[Path], columns: dict[str, str]) -> Iterator[Batch]:
    """Batches of rows as {column: value}, only the named columns.

    columns: the column's name -> the config key that names it, for messages. Values are text, or None.
    """
    for file in files:
        kind = _kind(file)
        if kind == "parquet":
            yield from _read_parquet(file, columns)
            continue
        with _open_text(file) as stream:
            try:
                if kind == "jsonl":
                    yield from _batched(_read_jsonl(file, stream, columns))
                else:
                    yield from _batched(_read_csv(file, stream, "\t" if kind == "tsv" else ",", columns))
            except UnicodeDecodeError:
                raise _bad_utf8(file, kind or "csv") from None
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                raise DataError(f"{file} is no whole gzip file: {error}. Copy or compress it again.") from error


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


def _read_csv(file: Path, stream: IO[str], delimiter: str, columns: dict[str, str]) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(_MOST_CHARACTERS)
    reader = csv.reader(stream, delimiter=delimiter, strict=True)
    try:
        header = next(record for record in reader if record)
    except StopIteration:
        raise DataError(f"{file} is empty: it needs a header line.") from None
    except csv.Error as error:
        raise DataError(f"{file}: the header: {error}. Look for a quote that is not closed.") from error
    places = {name: index for index, name in enumerate(header)}
    check_columns(file, header, columns)
    wanted = [(name, places[name]) for name in columns]
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
        raise DataError(f"{file} has a header, but no tickets below it.")


def _read_jsonl(file: Path, stream: IO[str], columns: dict[str, str]) -> Iterator[dict[str, Any]]:
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
        if not columns.keys() <= record.keys():
            check_columns(Path(f"{file}:{number}"), list(record), columns)
        count += 1
        row = {name: _as_text(record[name]) for name in columns}
        try:
            "".join(value or "" for value in row.values()).encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{file}:{number}: an escape in this line is half a character: {error}.") from error
        yield row
    if count == 0:
        raise DataError(f"{file} has no tickets in it.")


def _read_parquet(file: Path, columns: dict[str, str]) -> Iterator[Batch]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        parquet = pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file} is no Parquet file: {error}") from error
    check_columns(file, parquet.schema_arrow.names, columns)
    if parquet.metadata.num_rows == 0:
        raise DataError(f"{file} has no tickets in it.")
    try:
        for batch in parquet.iter_batches(_BATCH_ROWS, columns=list(columns)):
            yield [{name: _as_text(row[name]) for name in columns} for row in batch.to_pylist()]
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file} is damaged: {error}. Copy or write it again.") from error


def check_columns(where: Path | str, existing: Sequence[str], columns: dict[str, str]) -> None:
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


def _as_text(value: Any) -> str | None:
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


def open_dataset(path: str, revision: str | None, offline: bool = False) -> dict[str, Any] | None:
    """The splits of a folder that `datasets` saved or of `hub:NAME`, by name ("" for a single one); None for files."""
    if path.startswith("hub:"):
        return _open_hub(path.removeprefix("hub:"), revision, offline)
    folder = Path(path)
    if not folder.is_dir() or not any((folder / name).exists() for name in ("dataset_dict.json", "state.json")):
        return None
    import datasets

    try:
        loaded = datasets.load_from_disk(path)
    except (OSError, ValueError) as error:
        raise DataError(f"data.path is {path}, which `datasets` cannot load: {error}") from error
    return dict(loaded) if isinstance(loaded, datasets.DatasetDict) else {"": loaded}


def _open_hub(name: str, revision: str | None, offline: bool) -> dict[str, Any]:
    import datasets

    if not name:
        raise ConfigError("data.path is hub: without a name; write for example data.path=hub:owner/name.")
    what = f"data.path is hub:{name}" + (f" at {revision}" if revision else "")
    if not offline:
        check_reachable(what, "save it there with save_to_disk(FOLDER), and set data.path=FOLDER")
    try:
        loaded = datasets.load_dataset(name, revision=revision)
    except Exception as error:  # the library raises many kinds: no network, no such name, gated, scripts
        first = (str(error).splitlines() or [type(error).__name__])[0]
        if offline:
            raise DataError(
                f"{what}, but asking the hub is switched off (data.offline or HF_HUB_OFFLINE), and it was not "
                f"downloaded before: {first}\nRun `dist-train prepare` with data.offline=false where there is network, "
                "with the same HF_HOME."
            ) from error
        raise DataError(
            f"{what}, which could not be loaded: {first}\n"
            "Check the name and this machine's network; or download it elsewhere, save it with save_to_disk(FOLDER), "
            "and set data.path=FOLDER."
        ) from error
    return dict(loaded) if isinstance(loaded, dict) else {"": loaded}


def resolved_revision(dataset: Any) -> str | None:
    """The commit that a hub data set was downloaded from; None for a folder."""
    for address in dataset.info.download_checksums or {}:
        found = re.search(r"@([0-9a-f]{40})/", address)
        if found:
            return found[1]
    return None


def read_dataset(dataset: Any, where: str, columns: dict[str, str]) -> Iterator[Batch]:
    """Batches of a `datasets` split."""
    check_columns(where, dataset.column_names, columns)
    chosen = dataset.select_columns(list(columns))
    names = {name: getattr(dataset.features[name], "names", None) for name in columns}
    for start in range(0, len(chosen), _BATCH_ROWS):
        part = chosen[start : start + _BATCH_ROWS]
        rows = zip(*([_class_name(value, names[name]) for value in part[name]] for name in columns), strict=True)
        yield [dict(zip(columns, row, strict=True)) for row in rows]


def _class_name(value: Any, names: list[str] | None) -> str | None:
    """A ClassLabel column holds indices; its names are what people call the classes. -1 stands for no label there."""
    if names and value is not None:
        return names[value] if value >= 0 else None
    return _as_text(value)
