"""Read the user's log, events or sessions, into arrays of codes, in the order of the files. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dist_train.errors import ConfigError, DataError
from dist_train.table_files import TableFile, expand_files, read_files
from recipes.recsys import synthetic
from recipes.recsys.clock import Clock, Where
from recipes.recsys.config import DataConfig
from recipes.recsys.problems import Problems


@dataclass
class Log:
    """Sequences of items, each of one user: a user's whole log, one session, or one row of sessions.

    Of events the sequences are not yet made: they are one, in the order of the files, with a user each.
    """

    items: np.ndarray
    """Codes into `item_names`: [events] int32."""
    users: np.ndarray
    """Codes into `user_names`, of each event or of each row: int32."""
    user_names: list[str]
    item_names: list[str]
    times: np.ndarray | None = None
    """Milliseconds since 1970, of each event or of each row: int64."""
    weights: np.ndarray | None = None
    """[events] float32."""
    starts: np.ndarray | None = None
    """Where each row of sessions or sequences begins: [rows + 1] int64."""
    is_test: np.ndarray | None = None
    """Rows of data.test_path: [rows] bool."""
    notes: dict[str, int] = field(default_factory=dict)
    """What was left out, counted."""


class Names:
    """Codes of names, in the order in which they come."""

    def __init__(self, names: Sequence[str] = ()) -> None:
        self.codes: dict[str, int] = {name: index for index, name in enumerate(names)}

    def of(self, names: Sequence[str]) -> np.ndarray:
        codes = self.codes
        return np.fromiter((codes.setdefault(name, len(codes)) for name in names), np.int32, len(names))

    def listed(self) -> list[str]:
        return list(self.codes)


def read_log(data: DataConfig, table: Sequence[str] | None, say: Any) -> Log:
    """table: the ids of the item table, if there is one. DataError names what cannot be used."""
    if data.path is None:
        raise ConfigError(
            "data.path is not set: name your log, for example\n"
            "  data.path=events.csv data.items_path=items.csv data.text_columns=[title]\n"
            "To try the toolkit on a generated log: dist-train run recsys/demo",
            "data.path",
        )
    if data.path == "synthetic":
        users, items, times = synthetic.events(data.events, data.synthetic)
        user_names = [f"u{index}" for index in range(data.synthetic.users)]
        return Log(items, users, user_names, synthetic.item_names(data.synthetic), times)
    if data.kind == "events":
        return _read_events(data, table, say)
    return _read_rows(data, table)


def _read_events(data: DataConfig, table: Sequence[str] | None, say: Any) -> Log:
    if data.time_column is None:
        raise ConfigError(
            "data.time_column is null, but events need their time. Without times give sessions (data.kind=sessions) or "
            "sequences (data.kind=sequences data.split=leave_one_out).",
            "data.time_column",
        )
    keys = {name: f"data.{name}" for name in ("user_column", "item_column", "time_column", "type_column")}
    keys |= {"weight_column": "data.weight_column"}
    columns = {getattr(data, name): key for name, key in keys.items() if getattr(data, name) is not None}
    users, items, clock, problems = Names(), Names(table or ()), Clock(data.time_column), Problems()
    unknown = _Unknown(data, len(items.codes) if table is not None else None)
    parts: list[list[np.ndarray]] = [[], [], [], []]
    notes = {"events_of_other_types": 0}
    read = 0
    for file, where, batch in _batches(expand_files(data.path or "", "data.path"), columns):
        if data.types is not None:
            chosen = [index for index, row in enumerate(batch) if row[data.type_column or ""] in data.types]
            notes["events_of_other_types"] += len(batch) - len(chosen)
            batch, where = [batch[index] for index in chosen], where.of(chosen)
        if not batch:
            continue
        _check_filled(batch, [data.user_column, data.item_column], where, problems)
        codes = items.of([row[data.item_column] or "" for row in batch])
        times = clock.read([row[data.time_column] for row in batch], where, problems)
        keep = unknown.kept(codes, batch, where, problems)
        values = [users.of([row[data.user_column] or "" for row in batch]), codes, times]
        if data.weight_column is not None:
            values.append(_weights([row[data.weight_column] for row in batch], data.weight_column, where, problems))
        for part, value in zip(parts, values, strict=False):
            part.append(value[keep])
        read += len(batch)
        if read % 1_000_000 < len(batch) and read > len(batch):
            say(f"data           {read / 1e6:.0f} million events read, at {file}")
    problems.check(unknown.advice)
    if not parts[0]:
        raise DataError(f"no event is of the types {data.types} (data.types, in the column {data.type_column}).")
    if not any(len(part) for part in parts[1]):
        raise unknown.none_left()
    joined = [np.concatenate(part) if part else None for part in parts]
    assert joined[0] is not None
    assert joined[1] is not None
    if unknown.dropped:
        notes["events_of_unknown_items"] = unknown.dropped
    names = items.listed()[: unknown.table_size]
    return Log(joined[1], joined[0], users.listed(), names, joined[2], joined[3], notes=_counted(notes))


def _read_rows(data: DataConfig, table: Sequence[str] | None) -> Log:
    is_session = data.kind == "sessions"
    columns = {data.user_column: "data.user_column"}
    if is_session:
        columns |= {data.history_column: "data.history_column", data.target_column: "data.target_column"}
    else:
        columns |= {data.sequence_column: "data.sequence_column"}
    users, items, problems = Names(), Names(table or ()), Problems()
    unknown = _Unknown(data, len(items.codes) if table is not None else None)
    flat: list[np.ndarray] = []
    owners: list[np.ndarray] = []
    sizes: list[int] = []
    tests: list[bool] = []
    notes = {"rows_whose_target_is_unknown": 0, "rows_without_items": 0}
    for paths, key, is_test in ((data.path, "data.path", False), (data.test_path, "data.test_path", True)):
        if paths is None:
            continue
        for _, where, batch in _batches(expand_files(paths, key), columns):
            _check_filled(batch, [data.user_column, *([data.target_column] if is_session else [])], where, problems)
            owner = users.of([row[data.user_column] or "" for row in batch])
            for index, row in enumerate(batch):
                try:
                    names = read_list(row[data.history_column if is_session else data.sequence_column])
                except ValueError as error:
                    problems.add(where[index], str(error))
                    continue
                names += [row[data.target_column] or ""] if is_session else []
                codes = items.of(names)
                keep = unknown.kept(codes, [{data.item_column: name} for name in names], _Same(where[index]), problems)
                if is_session and not keep[-1:].all():
                    notes["rows_whose_target_is_unknown"] += 1
                    continue
                if not keep.any():
                    notes["rows_without_items"] += 1
                    continue
                flat.append(codes[keep])
                sizes.append(int(keep.sum()))
                owners.append(owner[index : index + 1])
                tests.append(is_test)
    problems.check(unknown.advice)
    if not flat:
        raise unknown.none_left()
    if unknown.dropped:
        notes["items_unknown"] = unknown.dropped
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    is_test_row = np.array(tests) if data.test_path is not None else None
    names = items.listed()[: unknown.table_size]
    owner_of = np.concatenate(owners)
    every = np.concatenate(flat)
    return Log(every, owner_of, users.listed(), names, starts=starts, is_test=is_test_row, notes=_counted(notes))


def read_list(text: str | None) -> list[str]:
    """Items of a cell: separated by blanks, or a JSON list. ValueError for a list that is broken."""
    text = (text or "").strip()
    if not text.startswith("["):
        return text.split()
    try:
        values = json.loads(text.replace("'", '"'))
    except ValueError as error:
        raise ValueError(f"{text[:60]!r} begins like a JSON list, but is none: {error}") from error
    return [str(value) for value in values]


class _Unknown:
    """Items that are not in the item table."""

    def __init__(self, data: DataConfig, table_size: int | None) -> None:
        self.table_size = table_size
        self.dropped = 0
        self._drops = data.unknown_items == "drop"
        self._column = data.item_column
        self.advice = "Mend these rows, or leave them out."
        if table_size is not None:
            self.advice += " data.unknown_items=drop leaves out events whose item is not in the item table."

    def none_left(self) -> DataError:
        return DataError(
            f"no event is left: {self.dropped:,} are of items that are not in the item table, by {self._column}. Are "
            "the ids written alike in both, leading zeros too?"
        )

    def kept(self, codes: np.ndarray, rows: Sequence[Any], where: Any, problems: Problems) -> np.ndarray:
        if self.table_size is None:
            return np.ones(len(codes), dtype=bool)
        known = codes < self.table_size
        self.dropped += int((~known).sum())
        if not self._drops:
            for index in np.flatnonzero(~known).tolist():
                problems.add(where[index], f"the item {rows[index][self._column]!r} is not in the item table")
        return known


class _Same:
    """One name for every place."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getitem__(self, index: int) -> str:
        return self._name


def _batches(files: list[TableFile], columns: dict[str, str]) -> Iterator[tuple[Any, Where, list[dict[str, Any]]]]:
    for file in files:
        first = 0
        for batch in read_files([file], columns):
            yield file.path, Where(file.path, range(first, first + len(batch))), batch
            first += len(batch)


def _check_filled(batch: list[dict[str, Any]], columns: list[str], where: Where, problems: Problems) -> None:
    for column in columns:
        for index, row in enumerate(batch):
            if not row[column]:
                problems.add(where[index], f"{column} is empty")


def _weights(texts: list[str | None], column: str, where: Where, problems: Problems) -> np.ndarray:
    values = np.ones(len(texts), dtype=np.float32)
    for index, text in enumerate(texts):
        try:
            values[index] = float(text or "")
        except ValueError:
            values[index] = np.nan
        if not (np.isfinite(values[index]) and values[index] > 0):
            problems.add(where[index], f"{column} is {text!r}, but a weight is a number above 0")
    return values


def _counted(notes: dict[str, int]) -> dict[str, int]:
    return {name: count for name, count in notes.items() if count}
