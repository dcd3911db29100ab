"""Predict with a model folder: the same answers from Python, from the command line, and on any number of ranks.

The work is cut into chunks of rows; a chunk is computed alike wherever it runs, so that ranks need not know each other:
python -m dist_train.predict FOLDER INPUT ROOT OUT ID_COLUMN RANK WORLD_SIZE
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from dist_train.errors import ConfigError, DataError, ToolkitError
from dist_train.evaluate import forward_rows
from dist_train.model_folder import LoadedModel, load_model_folder
from dist_train.records import CHUNK_ROWS, chunks_of, read_records
from dist_train.rundir import find_model_folder
from dist_train.task import Batch

# Padded positions of a batch on a CPU: activations that leave the cache cost more than the larger products save. 10,000
# tickets took 4.1 s in batches of about this size and 6.3 s in batches of 256 rows.
_CPU_POSITIONS, _CPU_LEAST_ROWS = 4096, 8
# Of encoded rows at once: 2,048 images of a megapixel would be two gigabytes.
_MOST_HELD_BYTES = 64 * 2**20
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Predictor:
    """A trained model that answers rows as a user has them."""

    def __init__(self, path: str | Path, device: str | None = None) -> None:
        """path: a run directory or a model folder, wherever it lies. device: as torch names it; else a GPU if one is
        here."""
        self.folder = find_model_folder(path)
        self._loaded: LoadedModel = load_model_folder(self.folder)
        for name in ("encode", "answers"):
            if not hasattr(self._loaded.task, name):
                raise ConfigError(
                    f"the task of {self._loaded.config.recipe} has no `{name}`, which predictions need: "
                    "dist_train/task.py says what it returns."
                )
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._loaded.model.to(self._device)

    def predict(self, rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """One answer a row, in order. rows: the columns that the model was trained on, by name."""
        answers: list[dict[str, Any]] = []
        for chunk in chunks_of((dict(row) for row in rows), self.chunk_rows):
            answers.extend(self.predict_chunk(chunk).to_pylist())
        return answers

    def predict_chunk(self, records: list[dict[str, Any]]) -> pa.Table:
        """The answers of at most `chunk_rows` rows at once."""
        return self._answer(self._forward_all(self._encode(records)))

    def timed(self, records: list[dict[str, Any]]) -> dict[str, float]:
        """Seconds that each stage of `predict_chunk` takes for these rows."""
        moments = [time.perf_counter()]
        rows = self._encode(records)
        moments.append(time.perf_counter())
        outputs = self._forward_all(rows)
        moments.append(time.perf_counter())
        self._answer(outputs)
        moments.append(time.perf_counter())
        return dict(zip(("encode", "forward", "answer"), np.diff(moments).tolist(), strict=True))

    @property
    def file_columns(self) -> tuple[str, ...]:
        """Columns that name files."""
        return tuple(getattr(self._loaded.task, "file_columns", ()))

    @property
    def chunk_rows(self) -> int:
        """Rows that are encoded and answered at once, so that what they take stays bounded."""
        row_bytes = max(1, int(getattr(self._loaded.task, "row_bytes", 1)))
        return min(CHUNK_ROWS, max(_CPU_LEAST_ROWS, _MOST_HELD_BYTES // row_bytes))

    @property
    def device_name(self) -> str:
        """The kind of device, as torch names it."""
        return self._device.type

    def _forward_all(self, rows: Any) -> dict[str, np.ndarray]:
        task = self._loaded.task
        # Rows of about one length share a batch, as in evaluation.
        lengths = np.asarray(rows.lengths)
        order = np.argsort(-lengths, kind="stable")
        with torch.no_grad():
            parts = [forward_rows(self._forward, task, rows, order[cut]) for cut in self._batches(lengths[order])]
        back = np.argsort(order, kind="stable")
        return {name: np.concatenate([part[name] for part in parts])[back] for name in parts[0]}

    def _answer(self, outputs: dict[str, np.ndarray]) -> pa.Table:
        table: pa.Table = self._loaded.task.answers(outputs, self._loaded.record["decision"])
        return table

    def _batches(self, lengths: np.ndarray) -> Iterator[slice]:
        """Cut rows of falling lengths into batches of at most eval.batch_size."""
        start, largest = 0, self._loaded.config.eval.batch_size
        while start < len(lengths):
            size = largest
            if self._device.type == "cpu":
                size = min(largest, max(_CPU_LEAST_ROWS, _CPU_POSITIONS // max(1, int(lengths[start]))))
            yield slice(start, start + size)
            start += size

    def _encode(self, records: list[dict[str, Any]]) -> Any:
        try:
            return self._loaded.task.encode(records)
        except KeyError as error:
            name = error.args[0] if error.args else None
            lacking = next((record for record in records if name not in record), None)
            if lacking is None:
                raise
            raise DataError(
                f"the rows to predict have no column {name!r}, which the model needs. Columns that they have: "
                f"{', '.join(map(str, lacking))}."
            ) from error
        except (TypeError, ValueError) as error:
            raise DataError(f"the rows to predict cannot be read as the model's input: {error}") from error

    def _forward(self, batch: Batch) -> dict[str, Tensor]:
        placed = {name: value.to(self._device) for name, value in batch.items()}
        # In the precision of the evaluation that chose temperature and threshold.
        dtype = _DTYPES.get(self._loaded.record["precision"])
        with torch.autocast(self._device.type, dtype, enabled=dtype is not None):
            outputs: dict[str, Tensor] = self._loaded.model(placed)
        return outputs


def predict_share(
    folder: str, source: str, root: str | None, out: Path, id_column: str, rank: int, world_size: int
) -> None:
    """Answer every chunk whose turn it is, each into a Parquet file of its own below `out`.

    root: where files lie that a table names; None: in its own folder. id_column: what names a row; "" where its number
    alone does.
    """
    device = f"cuda:{rank}" if torch.cuda.is_available() else "cpu"
    predictor = Predictor(folder, device)
    start = 0
    for index, chunk in enumerate(read_records(source, predictor.file_columns, root, predictor.chunk_rows)):
        if index % world_size == rank:
            table = predictor.predict_chunk(chunk)
            columns = {"row": pa.array(range(start, start + len(chunk)), pa.int64())}
            if id_column:
                columns["id"] = pa.array([_name_of(record, id_column) for record in chunk], pa.string())
            columns |= {name: table[name] for name in table.column_names}
            temporary = out / f".{index:08d}.tmp"
            pq.write_table(pa.table(columns), temporary)
            os.replace(temporary, out / f"{index:08d}.parquet")
        start += len(chunk)


def _name_of(record: Mapping[str, Any], column: str) -> str | None:
    value = record.get(column)
    return None if value is None else str(value)


def main(arguments: list[str]) -> int:
    """arguments: model folder, input, where the files lie that it names ("": in its own folder), folder of the answers,
    column that names a row, rank, number of ranks."""
    folder, source, root, out, id_column, rank, world_size = arguments
    try:
        predict_share(folder, source, root or None, Path(out), id_column, int(rank), int(world_size))
    except ToolkitError as error:
        print(f"{error.title}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
