"""dist-train predict: the answers of a model folder to a file of rows, computed on any number of processes."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from dist_train.config_io import load
from dist_train.errors import ConfigError, DataError, StorageError
from dist_train.hardware import detect_hardware
from dist_train.records import read_records
from dist_train.rundir import find_model_folder, storage_error, unwritable
from launcher.process import run_together

_SUFFIXES = (".csv", ".jsonl", ".parquet")


def predict(path: str, source: str, output: str | None, processes: int | None) -> None:
    """Answer the rows of `source` ("-": standard input) with the model at `path`. ToolkitError of the first process
    that fails; then nothing is written."""
    if output is not None and not output.endswith(_SUFFIXES):
        raise ConfigError(f"--output is {output}, but must end in one of {', '.join(_SUFFIXES)}.")
    gpus = len(detect_hardware().gpus)
    count = processes or gpus or 1
    if gpus and count > gpus:
        raise ConfigError(f"--gpus-per-node is {count}, but this machine has {gpus} GPUs.")
    began = time.monotonic()
    folder_of_model = str(find_model_folder(path))
    if output is not None:
        _check_writable(Path(output))
    with tempfile.TemporaryDirectory(prefix="dist-train-predict-") as folder:
        parts = Path(folder) / "parts"
        parts.mkdir()
        rows_file = _spool(Path(folder)) if source == "-" else source
        first = next(read_records(rows_file), None)  # what is no table is said before torch is imported
        if first is None:
            raise DataError(f"{'standard input' if source == '-' else source} has no rows.")
        root = os.getcwd() if source == "-" else ""  # what standard input names lies here
        module = [sys.executable, "-P", "-m", "dist_train.predict", folder_of_model, rows_file, root, str(parts)]
        module.append(_id_column(folder_of_model, first[0]))
        # One thread each, however many there are: sums over another number of threads round otherwise.
        environment = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        run_together([[*module, str(rank), str(count)] for rank in range(count)], environment)
        tables = [pq.ParquetFile(file) for file in sorted(parts.glob("*.parquet"))]
        rows = sum(table.metadata.num_rows for table in tables)
        _write(tables, output)
    seconds = time.monotonic() - began
    print(f"{rows:,} rows in {seconds:.1f} s{f': {output}' if output else ''}", file=sys.stderr)


def _id_column(folder: str, record: dict[str, Any]) -> str:
    """What names a row in the answers: the column that did in the training, else `id`; "" where there is neither."""
    config = load(str(Path(folder) / "recipe.yaml"), site=False).config
    names = (getattr(config.data, "id_column", None), "id")
    return next((name for name in names if name is not None and name in record), "")


def _check_writable(output: Path) -> None:
    """Tried by writing, before the work is done. StorageError."""
    probe = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise unwritable(output, error, "--output") from error


def _spool(folder: Path) -> str:
    """Standard input as a file: JSON lines where it begins with a brace, else CSV."""
    stream = sys.stdin.buffer
    first = stream.read(1)
    if not first:
        raise DataError("standard input is empty: it needs CSV with a header line, or JSON lines.")
    file = folder / ("input.jsonl" if first == b"{" else "input.csv")
    with open(file, "wb") as target:
        target.write(first)
        shutil.copyfileobj(stream, target)
    return str(file)


def _write(tables: list[pq.ParquetFile], output: str | None) -> None:
    """Whole or not at all; to standard output as CSV."""
    if output is None:
        try:
            # Not sys.stdout, which stays silent when it cannot be written: answers that are lost are an error.
            with open(os.dup(1), "w", encoding="utf-8", newline="") as stream:
                _write_csv(_batches(tables), stream)
        except BrokenPipeError:
            pass  # the reader has had enough
        except OSError as error:
            raise StorageError(f"the answers could not be written to standard output: {error.strerror}.") from error
        return
    target = Path(output)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        if target.suffix == ".parquet":
            with pq.ParquetWriter(temporary, tables[0].schema_arrow) as writer:
                for batch in _batches(tables):
                    writer.write_batch(batch)
        else:
            with open(temporary, "w", encoding="utf-8", newline="") as stream:
                (_write_csv if target.suffix == ".csv" else _write_jsonl)(_batches(tables), stream)
        os.replace(temporary, target)
    except OSError as error:
        raise storage_error(target, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _batches(tables: list[pq.ParquetFile]) -> Iterator[pa.RecordBatch]:
    for table in tables:
        yield from table.iter_batches()


def _write_csv(batches: Iterator[pa.RecordBatch], stream: IO[str]) -> None:
    writer: Any = None
    for batch in batches:
        if writer is None:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(batch.schema.names)
        writer.writerows(zip(*(_cells(column.to_pylist()) for column in batch.columns), strict=True))


def _cells(values: list[Any]) -> list[Any]:
    """Lists as JSON, which other programs read too."""
    return [json.dumps(value, ensure_ascii=False) if isinstance(value, list) else value for value in values]


def _write_jsonl(batches: Iterator[pa.RecordBatch], stream: IO[str]) -> None:
    for batch in batches:
        stream.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in batch.to_pylist())
