"""Put new items into the catalogue of a trained model: they are ranked by their content, as it was learnt."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow as pa

from dist_train.config_io import load
from dist_train.errors import ConfigError
from dist_train.model_folder import load_model_folder
from dist_train.prepared import load_facts, write_split
from dist_train.rundir import MODEL_RECORD, read_json, unwritable, write_json
from recipes.recsys.config import Config
from recipes.recsys.content import ContentModel
from recipes.recsys.data import items_table
from recipes.recsys.embeddings import write_embeddings
from recipes.recsys.item_table import NEVER, ItemTable, read_items
from recipes.recsys.model import Recommender
from recipes.recsys.stored import read_content
from recipes.recsys.stored import read_items as stored_items


def add_items(folder: Path, file: str, output: Path, say: Callable[[str], None]) -> None:
    """Write the model folder `folder` to `output` with the items of `file` in its catalogue: an item table as it was
    trained with. An item that is there already gets the content of the file. ConfigError, DataError."""
    config = cast(Config, load(str(folder / "recipe.yaml"), site=False).config)
    if config.model.items == "id":
        raise ConfigError(
            f"the model of {folder} knows items by their ids alone (model.items is id): a new one has no vector until "
            "it is trained on. Train with model.items=hybrid or content."
        )
    if output.exists():
        raise ConfigError(f"{output} is there already: name a folder that is not.")
    table = read_items(file, "FILE", config.data)
    facts = load_facts(folder)
    known = stored_items(folder)
    codes = {name: place for place, name in enumerate(known["id"].to_pylist())}
    is_new = np.array([name not in codes for name in table.names])
    changed = np.flatnonzero(~is_new)
    place = np.empty(len(table), dtype=np.int64)
    place[changed] = [codes[table.names[index]] for index in changed]
    place[is_new] = known.num_rows + np.arange(int(is_new.sum()))
    total = known.num_rows + int(is_new.sum())
    facts["added_items"] = int(facts.get("added_items", 0)) + int(is_new.sum())
    facts["items"] = total
    if table.available_from is not None:
        # Who asks without a time asks when the newest of them is there.
        facts["log_ends"] = max(facts["log_ends"], int(table.available_from.max()))
    unfinished = output.with_name(f".tmp-{output.name}")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        for path in folder.iterdir():
            shutil.copy2(path, unfinished / path.name)
        _write_content(folder, unfinished, table, place, known.num_rows)
        _write_items(unfinished, known, table, place)
        write_json(unfinished / "facts.json", facts)
        _write_vectors(unfinished, facts["added_items"])
        # Whole, or not there.
        unfinished.rename(output)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise unwritable(output, error, "--output") from error
    empty = int(table.without_content().sum())
    say(f"items          {int(is_new.sum()):,} added, {len(changed):,} with new content; {total:,} in the catalogue")
    if empty:
        say(f"warning        {empty:,} of the file have no content: the model cannot tell them from each other")


def _write_vectors(folder: Path, added: int) -> None:
    """Load it back, and export the vectors of all items."""
    version = write_embeddings(cast(Recommender, load_model_folder(folder).model), stored_items(folder), folder)
    record = read_json(folder / MODEL_RECORD)
    write_json(folder / MODEL_RECORD, {**record, "added_items": added, "embeddings_version": version})


def _write_content(folder: Path, output: Path, table: ItemTable, place: np.ndarray, before: int) -> None:
    """The arrays of the content, row 0 of no item."""
    encoded = ContentModel.load(folder).encode(table)
    rows = max(before, int(place.max()) + 1) + 1
    for name, old, own in zip(("numbers", "categories"), read_content(folder), encoded, strict=True):
        values = np.zeros((rows, old.shape[1]), dtype=old.dtype)
        values[: before + 1] = old
        values[place + 1] = own
        np.save(output / f"{name}.npy", values)


def _write_items(output: Path, known: pa.Table, table: ItemTable, place: np.ndarray) -> None:
    """What is known of the items: that of the file where it has them; how often they were trained on stays."""
    is_old = place < known.num_rows
    counts, appears = np.zeros(len(place), dtype=np.int64), np.full(len(place), NEVER)
    if table.available_from is not None:
        appears = table.available_from.copy()
    old = known.take(pa.array(place[is_old]))
    counts[is_old], appears[is_old] = old["count"].to_numpy(), old["appears"].to_numpy()
    own = items_table(table, counts, appears)
    # Of each item the line to keep: its old one, or that of the file.
    lines = np.arange(max(known.num_rows, int(place.max()) + 1))
    lines[place] = known.num_rows + np.arange(len(place))
    write_split(output, "items", pa.concat_tables([known, own.cast(known.schema)]).take(pa.array(lines)))
