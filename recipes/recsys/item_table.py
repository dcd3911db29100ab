"""Read the item table: ids, text, categories, numbers and when an item may be recommended. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from dist_train.errors import DataError
from dist_train.table_files import expand_files, read_files
from recipes.recsys import synthetic
from recipes.recsys.clock import Clock, Where
from recipes.recsys.config import DataConfig
from recipes.recsys.problems import Problems

ALWAYS, NEVER = np.iinfo(np.int64).min, np.iinfo(np.int64).max


@dataclass
class ItemTable:
    """The items in the order of the table, or of `take`."""

    names: list[str]
    texts: list[list[str]] = field(default_factory=list)
    """A list for each of data.text_columns."""
    categories: list[list[str]] = field(default_factory=list)
    """A list for each of data.category_columns; "" where there is none."""
    numbers: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    """[items, columns] float64, NaN where there is none."""
    available_from: np.ndarray | None = None
    """[items] int64, milliseconds since 1970."""
    available_until: np.ndarray | None = None
    written: np.ndarray | None = None
    """When each row was written: [items] int64."""

    def __len__(self) -> int:
        return len(self.names)

    def take(self, order: np.ndarray) -> ItemTable:
        chosen = order.tolist()
        arrays = (self.available_from, self.available_until, self.written)
        return ItemTable(
            [self.names[index] for index in chosen],
            [[column[index] for index in chosen] for column in self.texts],
            [[column[index] for index in chosen] for column in self.categories],
            self.numbers[order],
            *(None if array is None else array[order] for array in arrays),
        )

    def without_content(self) -> np.ndarray:
        """[items] bool: no text, no category and no number."""
        empty = np.isnan(self.numbers).all(1) if self.numbers.size else np.ones(len(self), dtype=bool)
        for column in (*self.texts, *self.categories):
            empty &= np.array([not value for value in column])
        return empty


def bare_table(names: Sequence[str]) -> ItemTable:
    """Items of which nothing but the id is known."""
    return ItemTable(list(names), numbers=np.zeros((len(names), 0)))


def read_item_table(data: DataConfig) -> ItemTable | None:
    """None where there is none. DataError names what cannot be used."""
    if data.path == "synthetic":
        return table_of(synthetic.items(data.synthetic), data, "synthetic")
    if data.items_path is None:
        return None
    return read_items(data.items_path, "data.items_path", data)


def read_items(paths: str | list[str], key: str, data: DataConfig) -> ItemTable:
    """The items of these files, with the columns of the config."""
    asked = _columns(data)
    columns: dict[str, list[str]] = {name: [] for name in asked}
    for batch in read_files(expand_files(paths, key), asked):
        for name, values in columns.items():
            values += [(row[name] or "").strip() for row in batch]
    return table_of(columns, data, str(paths))


def table_of(columns: dict[str, list[str]], data: DataConfig, where: str) -> ItemTable:
    """columns: the texts of each by name."""
    names = columns[data.item_column]
    problems, places = Problems(), Where(where, range(len(names)))
    first: dict[str, int] = {}
    for index, name in enumerate(names):
        if not name:
            problems.add(places[index], f"{data.item_column} is empty")
        elif first.setdefault(name, index) != index:
            problems.add(places[index], f"the item {name!r} stands in row {first[name] + 1} already")

    def moments(column: str | None, missing: int) -> np.ndarray | None:
        if column is None:
            return None
        texts = columns[column]
        given = [index for index, text in enumerate(texts) if text]
        values = np.full(len(names), missing, dtype=np.int64)
        values[given] = Clock(column).read([texts[index] for index in given], places.of(given), problems)
        return values

    table = ItemTable(
        names,
        [columns[column] for column in data.text_columns],
        [columns[column] for column in data.category_columns],
        _numbers([columns[column] for column in data.number_columns], data.number_columns, places, problems),
        moments(data.available_from_column, ALWAYS),
        moments(data.available_until_column, NEVER),
        moments(data.content_time_column, ALWAYS),
    )
    problems.check("Mend these rows of the item table, or leave them out.")
    if not names:
        raise DataError(f"{where} has no items.")
    return table


def _columns(data: DataConfig) -> dict[str, str]:
    columns = {data.item_column: "data.item_column"}
    for key in ("text_columns", "category_columns", "number_columns"):
        columns |= dict.fromkeys(getattr(data, key), f"data.{key}")
    for key in ("available_from_column", "available_until_column", "content_time_column"):
        if getattr(data, key) is not None:
            columns[getattr(data, key)] = f"data.{key}"
    return columns


def _numbers(texts: list[list[str]], names: list[str], places: Where, problems: Problems) -> np.ndarray:
    """texts: of each column, for each item."""
    values = np.full((len(places), len(names)), np.nan)
    for column, own in enumerate(texts):
        for index, text in enumerate(own):
            if not text:
                continue
            try:
                values[index, column] = float(text)
            except ValueError:
                problems.add(places[index], f"{names[column]} is {text!r}, which is no number (data.number_columns)")
    values[~np.isfinite(values)] = np.nan
    return values
