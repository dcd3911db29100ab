"""Prepare the tickets: read, validate, split, tokenise into a cache folder keyed by content. Torch-free.

A prepared folder holds facts.json, train.arrow, validation.arrow, test.arrow and tokenizer/, and exists whole or not.
"""

from __future__ import annotations

import collections
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dist_train.config import CachedData
from dist_train.errors import DataError
from dist_train.rundir import fsync_folder, json_text, unwritable
from recipes.ticket_routing import split
from recipes.ticket_routing.config import Config, DataConfig
from recipes.ticket_routing.duplicates import group_near_duplicates, normalise
from recipes.ticket_routing.hub import pins as pins
from recipes.ticket_routing.hub import pretrained_facts
from recipes.ticket_routing.sources import Source, find_sources
from recipes.ticket_routing.tokens import describe_ready, make_tokenizer

# Changes whenever the same source would be prepared differently.
VERSION = 1
_FILES = ("facts.json", "train.arrow", "validation.arrow", "test.arrow", "tokenizer/tokenizer.json")
_WRITE_ROWS = 1000


@dataclass
class Tickets:
    """All rows, as columns."""

    texts: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    times: list[str | None] = field(default_factory=list)
    own_split: list[str | None] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    """Number of each row in the source."""
    empty_texts: int = 0


def prepare(config: Config, report: Callable[[str], None] = print) -> Path:
    """The prepared folder for this config; built once, found again by content. ConfigError, DataError, StorageError."""
    from filelock import FileLock

    sources = find_sources(config.data)
    key = _fingerprint(config, sources)
    root = config.data.cache_dir
    folder = root / f"tickets-{key[:24]}"
    if is_whole(folder):
        report(f"data           prepared before: {folder}")
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".tickets-{key[:24]}.lock"):
            if not is_whole(folder):
                _build(config, sources, key, folder, report)
    except OSError as error:
        raise unwritable(folder, error, "data.cache_dir") from error
    return folder


def is_whole(folder: Path) -> bool:
    return all((folder / name).is_file() for name in _FILES)


def load_facts(folder: Path | str) -> dict[str, Any]:
    """facts.json: labels, counts, split, leak report, fingerprint."""
    return json.loads((Path(folder) / "facts.json").read_text(encoding="utf-8"))


def misfit(then: dict[str, Any], now: dict[str, Any]) -> str | None:
    """Why weights that were trained on data of the facts `then` cannot go on with that of `now`; None if they can."""
    if then["labels"] != now["labels"]:
        return "its queues are other ones. Start a new run."
    if then["vocabulary"] != now["vocabulary"]:
        return f"its vocabulary has {now['vocabulary']} entries instead of {then['vocabulary']}. Start a new run."
    return None


def lengths(folder: Path | str) -> Any:
    """Tokens of each training row, as a numpy array."""
    import pyarrow.compute as pc

    return pc.list_value_length(read_split(folder, "train")["input_ids"]).to_numpy()


def read_split(folder: Path | str, name: str) -> Any:
    """A split as a pyarrow Table over a memory map."""
    import pyarrow as pa

    with pa.memory_map(str(Path(folder) / f"{name}.arrow")) as source:
        return pa.ipc.open_stream(source).read_all()


def _fingerprint(config: Config, sources: list[Source]) -> str:
    """Of all that the prepared folder depends on: contents, not paths."""
    content = [
        {name: value for name, value in source.fingerprint.items() if name != "dataset"}  # where a data set lies
        | {"files": [file["sha256"] for file in source.fingerprint.get("files", [])]}
        for source in sources
    ]
    elsewhere = {"path", "validation_path", "test_path", "rows", "synthetic", "tokenizer", "tokenizer_revision"}
    keys = config.data.model_dump(mode="json", exclude=elsewhere | set(CachedData.model_fields))
    described = {"version": VERSION, "content": content, "keys": keys, "pretrained": config.model.pretrained}
    tokenizer = describe_ready(config)
    if tokenizer is not None:
        described["tokenizer"] = tokenizer
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def _build(config: Config, sources: list[Source], key: str, folder: Path, report: Callable[[str], None]) -> None:
    began = time.monotonic()
    report(f"data           reading {', '.join(source.where for source in sources)}")
    tickets = _read(config.data, sources)
    warnings = _validate(tickets, config.data)
    names = sorted(set(tickets.labels))
    index_of = {name: index for index, name in enumerate(names)}
    labels = np.array([index_of[label] for label in tickets.labels], dtype=np.int32)
    report(f"data           {len(labels)} tickets in {len(names)} classes; looking for near-duplicates")
    groups = group_near_duplicates(tickets.texts)
    split_of, method = _split(tickets, labels, groups, config.data)
    _check_split(split_of, labels, len(np.unique(groups)), names, method)
    # Texts without words are told apart by their signs.
    copies = len(tickets.texts) - len({normalise(text) or text for text in tickets.texts})
    leaks = {"exact_duplicates": copies, **split.leak_report(split_of, labels, groups)}
    crossing = sum(leaks["groups_crossing"].values())
    if crossing:
        warnings.append(f"{crossing} groups of near-duplicates lie on both sides of a split that was given")
    report("data           training the tokenizer and tokenising")
    temporary = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)  # what a killed preparation left; we hold the lock
    try:
        (temporary / "tokenizer").mkdir(parents=True)
        train_texts = (tickets.texts[index] for index in np.flatnonzero(split_of == split.TRAIN))
        tokenizer = make_tokenizer(config, train_texts, temporary / "tokenizer")
        lengths = _write_splits(temporary, tickets, labels, split_of, tokenizer)
        facts = {
            "fingerprint": key,
            "sources": [source.fingerprint for source in sources],
            "rows": len(labels),
            "labels": names,
            "splits": {name: _counts(labels[split_of == index], names) for index, name in enumerate(split.NAMES)},
            "split": {"method": method, "seed": config.data.split_seed},
            "leaks": leaks,
            "lengths": _describe_lengths(lengths, config.data.max_tokens),
            "vocabulary": tokenizer.get_vocab_size(),
            "warnings": warnings,
            **pretrained_facts(config, folder),
        }
        (temporary / "facts.json").write_text(json_text(facts), encoding="utf-8")
        _make_durable(temporary)
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one
        os.rename(temporary, folder)
        fsync_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for warning in warnings:
        report(f"warning        {warning}")
    report(f"data           prepared in {time.monotonic() - began:.1f} s: {folder}")


def _make_durable(folder: Path) -> None:
    """A power cut must not leave empty files behind a rename that lasted."""
    for path in folder.rglob("*"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _read(data: DataConfig, sources: list[Source]) -> Tickets:
    columns = dict.fromkeys(data.text_columns, "data.text_columns")
    columns[data.label_column] = "data.label_column"
    optional = {"id_column": data.id_column, "time_column": data.time_column, "split_column": data.split_column}
    columns |= {name: f"data.{key}" for key, name in optional.items() if name is not None}
    tickets, row = Tickets(), 0
    for source in sources:
        for batch in source.batches(columns):
            for record in batch:
                _append(tickets, record, row, source, data)
                row += 1
    return tickets


def _append(tickets: Tickets, record: dict[str, Any], row: int, source: Source, data: DataConfig) -> None:
    label = (record[data.label_column] or "").strip()
    if not label:
        raise DataError(
            f"{source.where}: row {row} has no label in {data.label_column!r}. Fill it in, or leave the row out."
        )
    text = "\n".join(record[name] or "" for name in data.text_columns).strip()
    if not text:
        tickets.empty_texts += 1
        return
    tickets.texts.append(text)
    tickets.labels.append(label)
    tickets.rows.append(row)
    tickets.ids.append(str(record[data.id_column]) if data.id_column else str(row))
    tickets.times.append(record[data.time_column] if data.time_column else None)
    tickets.own_split.append(record[data.split_column] if data.split_column else source.split)


def _validate(tickets: Tickets, data: DataConfig) -> list[str]:
    """Drop what the config says to drop, refuse what cannot be split. Returns warnings."""
    warnings = []
    if tickets.empty_texts:
        warnings.append(f"{tickets.empty_texts} rows without text were left out")
    counts: dict[str, int] = collections.Counter(tickets.labels)
    rare = {label: count for label, count in counts.items() if count < (data.drop_labels_below or 0)}
    if rare:
        kept = [index for index, label in enumerate(tickets.labels) if label not in rare]
        for name in ("texts", "labels", "ids", "times", "own_split", "rows"):
            column = getattr(tickets, name)
            setattr(tickets, name, [column[index] for index in kept])
        warnings.append(f"data.drop_labels_below left out {sum(rare.values())} rows of: {', '.join(sorted(rare))}")
    counts = {label: count for label, count in counts.items() if label not in rare}
    if len(counts) < 2:
        if not counts and tickets.empty_texts:
            raise DataError(
                f"all {tickets.empty_texts} rows are without text in {', '.join(data.text_columns)}: "
                "change data.text_columns."
            )
        what = f"all rows have the class {next(iter(counts))!r}" if counts else "no row is left"
        raise DataError(f"{what} in {data.label_column!r}: at least two classes are needed. Change data.label_column.")
    folded = collections.Counter(label.casefold() for label in counts)
    alike = sorted(label for label in counts if folded[label.casefold()] > 1)
    if alike:
        warnings.append(f"classes that differ in case alone count as different: {', '.join(map(repr, alike[:10]))}")
    alone = sorted(label for label, count in counts.items() if count == 1)
    if alone:
        raise DataError(
            f"a class with one row only cannot be split: {', '.join(map(repr, alone[:10]))}"
            f"{' …' if len(alone) > 10 else ''}.\nMerge them, or leave them out with data.drop_labels_below=2."
        )
    return warnings


def _split(tickets: Tickets, labels: np.ndarray, groups: np.ndarray, data: DataConfig) -> tuple[np.ndarray, str]:
    apart = groups if data.near_duplicates == "group" else np.arange(len(labels))
    where = "the data"
    if data.split_column is not None or any(name is not None for name in tickets.own_split):
        # Rows whose source names no split train, as with a validation file; an empty cell of split_column is an error.
        unnamed = "" if data.split_column is not None else "train"
        result = split.by_column([name or unnamed for name in tickets.own_split], tickets.rows, where)
        if not (result == split.TEST).any():
            if data.split_column is not None:
                raise DataError("the given split has no test rows: give some, or let the toolkit split all of it.")
            result = split.carve(result, labels, apart, data, split.TEST)
        if not (result == split.VALIDATION).any():
            result = split.carve(result, labels, apart, data, split.VALIDATION)
        return result, "column" if data.split_column else "files"
    if data.time_column is not None:
        result = split.by_time(split.parse_times(tickets.times, tickets.rows, where), data)
        return (split.drop_later_copies(result, groups) if data.near_duplicates == "group" else result), "time"
    return split.stratified(labels, apart, data), "stratified"


def _check_split(split_of: np.ndarray, labels: np.ndarray, groups: int, names: list[str], method: str) -> None:
    for index, name in enumerate(split.NAMES):
        if not (split_of == index).any():
            raise DataError(
                f"the {name} split ({method}) is empty: {len(labels)} rows in {groups} groups of near-duplicates are "
                "too few for these shares."
            )
    known = set(labels[split_of == split.TRAIN])
    for index in (split.VALIDATION, split.TEST):
        unknown = sorted(names[label] for label in set(labels[split_of == index]) - known)
        if unknown:
            raise DataError(
                f"the {split.NAMES[index]} split has classes that training lacks: "
                f"{', '.join(map(repr, unknown[:10]))}.\n"
                "A model cannot predict them: move some of their rows into training, or leave them out with "
                "data.drop_labels_below."
            )


def _write_splits(
    folder: Path, tickets: Tickets, labels: np.ndarray, split_of: np.ndarray, tokenizer: Any
) -> np.ndarray:
    """One Arrow stream a split. Returns the token counts of the rows."""
    import datasets
    from datasets.arrow_writer import ArrowWriter

    features = datasets.Features(
        {
            "row": datasets.Value("int64"),
            "id": datasets.Value("string"),
            "text": datasets.Value("string"),
            "label": datasets.Value("int32"),
            "input_ids": datasets.List(datasets.Value("int32")),
        }
    )
    lengths: list[int] = []
    for index, name in enumerate(split.NAMES):
        chosen = np.flatnonzero(split_of == index)
        path = str(folder / f"{name}.arrow")
        with ArrowWriter(features=features, path=path, writer_batch_size=_WRITE_ROWS) as writer:
            for start in range(0, len(chosen), _WRITE_ROWS):
                part = chosen[start : start + _WRITE_ROWS].tolist()
                encoded = tokenizer.encode_batch_fast([tickets.texts[row] for row in part])
                # A text of unknown signs alone may come out empty; the model needs one token.
                ids = [encoding.ids or [1] for encoding in encoded]
                lengths.extend(len(row) for row in ids)
                writer.write_batch(
                    {
                        "row": [tickets.rows[row] for row in part],
                        "id": [tickets.ids[row] for row in part],
                        "text": [tickets.texts[row] for row in part],
                        "label": labels[part],
                        "input_ids": ids,
                    }
                )
            writer.finalize()
    return np.array(lengths)


def _counts(labels: np.ndarray, names: list[str]) -> dict[str, Any]:
    counts = np.bincount(labels, minlength=len(names))
    return {"rows": len(labels), "labels": {name: int(count) for name, count in zip(names, counts, strict=True)}}


def _describe_lengths(lengths: np.ndarray, max_tokens: int) -> dict[str, float]:
    return {
        "mean": round(float(lengths.mean()), 1),
        "p50": float(np.percentile(lengths, 50)),
        "p90": float(np.percentile(lengths, 90)),
        "max": float(lengths.max()),
        "at_limit_share": round(float((lengths >= max_tokens).mean()), 4),
    }
