"""Prepare the log: sessions, their split by time, and the items' content, fitted to what came before. Torch-free."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dist_train.config import CachedData
from dist_train.errors import DataError
from dist_train.prepared import load_facts, write_split
from dist_train.table_files import expand_files
from recipes.recsys import leaks, synthetic
from recipes.recsys.clock import DAY_MS
from recipes.recsys.config import Config, DataConfig
from recipes.recsys.content import ContentModel, fit_content
from recipes.recsys.item_table import ALWAYS, NEVER, ItemTable, bare_table, read_item_table
from recipes.recsys.log import Log, read_log
from recipes.recsys.rules import VERSION as RULES_VERSION
from recipes.recsys.rules import write_rules
from recipes.recsys.sessions import BEGIN, FIRST, SPLITS, STOP, Sessions, Split, make_sessions, ranges, split_sessions

# Changes whenever the same source would be prepared differently.
VERSION = 2
_TITLE_CHARACTERS = 120
# Of an event of long ago: more than nothing, so that a row of such events has its share of the loss.
_LEAST_WEIGHT = 1e-6
MOST_FULL_ITEMS = 200_000
"""Trained items up to which task.loss=auto takes the full softmax."""
Say = Callable[[str], None]


def describe(config: Config) -> dict[str, Any]:
    """All that the prepared folder depends on: contents, not paths."""
    data = config.data
    elsewhere = {"path", "test_path", "items_path", "events", "synthetic"}
    keys = data.model_dump(mode="json", exclude=elsewhere | set(CachedData.model_fields))
    described: dict[str, Any] = {"version": VERSION, "keys": keys}
    if config.model.rules_share:
        described["rules"] = RULES_VERSION
    if data.path == "synthetic":
        described["synthetic"] = [synthetic.VERSION, data.events, data.synthetic.model_dump()]
        return described
    for key in ("path", "test_path", "items_path"):
        paths = getattr(data, key)
        if paths is not None:
            files = expand_files(paths, f"data.{key}")
            described[key] = [[_digest(file.path), file.partition()] for file in files]
    return described


def build(config: Config, folder: Path, say: Say) -> dict[str, Any]:
    """Write the prepared files into `folder`; returns the facts. ConfigError, DataError."""
    data, began = config.data, time.monotonic()
    table = read_item_table(data)
    log = read_log(data, None if table is None else table.names, say)
    say(f"data           {len(log.items):,} events of {len(log.user_names):,} users on {len(log.item_names):,} items")
    sessions = make_sessions(log, data)
    split = split_sessions(sessions, log, data)
    if data.half_life_days is not None:
        sessions.weights = _aged_weights(sessions, split, data.half_life_days)
    found = leaks.check_split(sessions, split)
    table = bare_table(log.item_names) if table is None else table
    has_table = data.items_path is not None or data.path == "synthetic"
    counts = np.bincount(sessions.items[split.trained], minlength=len(table))
    # The items that were trained on come first, the commonest at the top; the others as they stand in the table.
    order = np.lexsort((np.arange(len(table)), -counts))
    trained = int((counts > 0).sum())
    order = order if has_table else order[:trained]
    table, counts = table.take(order), counts[order]
    code = np.zeros(len(log.item_names), dtype=np.int32)
    code[order] = np.arange(1, len(order) + 1)
    events = code[sessions.items]
    content = fit_content(table.take(np.arange(trained)), data)
    warnings = leaks.check_content(table, counts, _later_counts(events, split, len(table)), split, data)
    warnings += _warnings(log, split, table, data, found)
    appears = _appearances(events, sessions, split, table)
    _write(folder, events, sessions, split, log, table, counts, appears, content)
    if config.model.rules_share:
        write_rules(folder, events, split.rows["train"], trained)
    for warning in warnings:
        say(f"warning        {warning}")
    say(f"data           {split.method}; took {time.monotonic() - began:.1f} s")
    say(f"loss           {about_loss(config, trained)}")
    return {
        "sources": [{"path": str(data.path)}],
        "rows": sum(len(rows) for rows in split.rows.values()),
        "events": len(events),
        "users": len(log.user_names),
        "items": len(table),
        "trained_items": trained,
        "trained_events": int(split.trained.sum()),
        "category_sizes": content.category_sizes,
        "has_times": sessions.times is not None,
        "has_weights": sessions.weights is not None,
        "has_availability": table.available_from is not None or table.available_until is not None,
        "log_ends": 0 if sessions.times is None else int(sessions.times.max()),
        "cuts": list(split.cuts) if split.cuts else None,
        "most_targets": {name: _most_targets(rows) for name, rows in split.rows.items()},
        "longest": min(data.max_history, _longest(split)),
        "splits": {name: _counts(events, rows, trained) for name, rows in split.rows.items()},
        "split": {"method": split.method, "seed": None},
        "leaks": found,
        "notes": {**log.notes, **split.notes},
        "warnings": warnings,
    }


def misfit(then: dict[str, Any], now: dict[str, Any]) -> str | None:
    """Why weights that were trained on data of the facts `then` cannot go on with that of `now`; None if they can."""
    for key, what in (("trained_items", "trained items"), ("category_sizes", "categories")):
        if then[key] != now[key]:
            return f"its {what} are {then[key]} instead of {now[key]}. Start a new run."
    return None


def lengths(folder: Path | str) -> Any:
    """Events that the model reads of each training row, as a numpy array."""
    return row_lengths(np.load(Path(folder) / "train.npy", mmap_mode="r"), load_facts(folder)["longest"])


def row_lengths(rows: np.ndarray, longest: int) -> np.ndarray:
    """[rows] int64. The start of the session is read too."""
    return np.minimum(rows[:, STOP] - 1 - rows[:, BEGIN], longest) + 1


def chosen_loss(config: Config, trained: int) -> str:
    """full or sampled: what task.loss says, or what the number of trained items does."""
    if config.task.loss != "auto":
        return config.task.loss
    return "full" if trained <= MOST_FULL_ITEMS else "sampled"


def about_loss(config: Config, trained: int) -> str:
    """The loss for the user."""
    if chosen_loss(config, trained) == "full":
        return f"full softmax over {trained:,} trained items, exact"
    return f"sampled softmax: {config.task.negatives:,} of {trained:,} trained items a forward pass, with logQ"


def _write(
    folder: Path,
    events: np.ndarray,
    sessions: Sessions,
    split: Split,
    log: Log,
    table: ItemTable,
    counts: np.ndarray,
    appears: np.ndarray,
    content: ContentModel,
) -> None:
    np.save(folder / "events.npy", events)
    if sessions.times is not None:
        np.save(folder / "times.npy", sessions.times)
    if sessions.weights is not None:
        np.save(folder / "weights.npy", sessions.weights)
    for name in SPLITS:
        np.save(folder / f"{name}.npy", split.rows[name])
    write_split(folder, "users", pa.table({"id": pa.array(log.user_names, pa.large_string())}))
    _write_catalogue(folder, table, counts, appears, content)


def _write_catalogue(
    folder: Path, table: ItemTable, counts: np.ndarray, appears: np.ndarray, content: ContentModel
) -> None:
    """The items with their content, and what it was made by; what a model folder needs too."""
    numbers, categories = content.encode(table)
    np.save(folder / "numbers.npy", np.concatenate([np.zeros((1, numbers.shape[1]), np.float32), numbers]))
    np.save(folder / "categories.npy", np.concatenate([np.zeros((1, categories.shape[1]), np.int32), categories]))
    content.save(folder)
    write_split(folder, "items", items_table(table, counts, appears))


def items_table(table: ItemTable, counts: np.ndarray, appears: np.ndarray) -> pa.Table:
    """A line an item, as `read_items` of stored.py gives it."""
    titles = table.texts[0] if table.texts else table.names
    columns = {
        "id": pa.array(table.names, pa.large_string()),
        "title": pa.array([title[:_TITLE_CHARACTERS] for title in titles], pa.large_string()),
        "count": counts,
        "appears": appears,
    }
    for name, values, missing in (
        ("available_from", table.available_from, ALWAYS),
        ("available_until", table.available_until, NEVER),
    ):
        columns[name] = np.full(len(table), missing) if values is None else values
    return pa.table(columns)


def _aged_weights(sessions: Sessions, split: Split, half_life_days: float) -> np.ndarray:
    """What each event counts, less the older it is: [events] float32."""
    assert sessions.times is not None
    assert split.cuts is not None
    age = np.maximum(split.cuts[0] - sessions.times, 0) / DAY_MS
    weights = np.exp2(-age / half_life_days) * (1.0 if sessions.weights is None else sessions.weights)
    return np.maximum(weights, _LEAST_WEIGHT).astype(np.float32)


def _appearances(events: np.ndarray, sessions: Sessions, split: Split, table: ItemTable) -> np.ndarray:
    """When each item was there to be taken: since its first training event, or available: [items] int64."""
    appears = np.full(len(table), NEVER)
    if sessions.times is not None:
        np.minimum.at(appears, events[split.trained] - 1, sessions.times[split.trained])
    return appears if table.available_from is None else np.minimum(appears, table.available_from)


def _later_counts(events: np.ndarray, split: Split, items: int) -> np.ndarray:
    return np.bincount(events[~split.trained], minlength=items + 1)[1:]


def _most_targets(rows: np.ndarray) -> int:
    return int((rows[:, STOP] - rows[:, FIRST]).max())


def _longest(split: Split) -> int:
    return max(1, *(int((rows[:, STOP] - 1 - rows[:, BEGIN]).max()) for rows in split.rows.values()))


def _counts(events: np.ndarray, rows: np.ndarray, trained: int) -> dict[str, Any]:
    targets = _targets(events, rows)
    return {"rows": len(rows), "targets": len(targets), "targets_not_trained": int(is_unseen(targets, trained).sum())}


def is_unseen(items: np.ndarray, trained: int) -> np.ndarray:
    """Whether an item is none that was trained on."""
    return (items == 0) | (items > trained)


def _targets(events: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return events[ranges(rows[:, FIRST], rows[:, STOP])[1]]


def _warnings(log: Log, split: Split, table: ItemTable, data: DataConfig, found: dict[str, int]) -> list[str]:
    warnings = []
    if data.split == "leave_one_out":
        warnings.append(
            "leave-one-out is a legacy protocol: events of other users that came later train too, so what is measured "
            "is better than a deployed model can be"
        )
    has_content = table.texts or table.categories or table.numbers.size
    empty = int(table.without_content().sum()) if has_content else 0
    if empty == len(table) and has_content:
        raise DataError(
            "no item has any content: data.text_columns, data.category_columns and data.number_columns are empty."
        )
    if empty:
        warnings.append(f"{empty:,} items have no content: the model knows those by their own vectors alone")
    if found["sessions_crossing"]:
        warnings.append(
            f"{found['sessions_crossing']:,} rows of validation and test are in the training too, with the same user, "
            "history and target: what is measured on them is too good"
        )
    return warnings


def _digest(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
