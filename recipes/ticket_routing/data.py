"""Prepare the tickets: read and sign them in chunks, group near-duplicates, split, tokenise. Torch-free.

Chunks are kept beside the prepared folders, so that data that grows costs only what is new; stored.py reads the result.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dist_train.config import CachedData
from dist_train.errors import DataError
from dist_train.prepared import check_space, is_whole
from dist_train.pretrained import pretrained_facts
from dist_train.worker_pool import map_in_workers
from recipes.ticket_routing import chunks, split
from recipes.ticket_routing.chunks import Columns
from recipes.ticket_routing.config import Config, DataConfig
from recipes.ticket_routing.duplicates import words_of
from recipes.ticket_routing.earlier import earlier_model
from recipes.ticket_routing.groups import BLOCK_ROWS, Grouped, group
from recipes.ticket_routing.hub import pins as pins
from recipes.ticket_routing.labels import check_missing, choose_labels, departures
from recipes.ticket_routing.sources import Source, find_sources
from recipes.ticket_routing.tickets import Part, Tickets
from recipes.ticket_routing.tokens import describe_ready, file_hash, make_tokenizer
from recipes.ticket_routing.trained_before import count_trained_before, write_trained

# Changes whenever the same source would be prepared differently.
VERSION = 2
_SAY_EVERY_S = 20.0
Say = Callable[[str], None]


def describe(config: Config) -> dict[str, Any]:
    """All that the prepared folder depends on: contents, not paths."""
    content = [
        {name: value for name, value in source.fingerprint.items() if name != "dataset"}  # where a data set lies
        | {"files": [[file["sha256"], file.get("partition")] for file in source.fingerprint.get("files", [])]}
        for source in find_sources(config.data)
    ]
    elsewhere = {"path", "validation_path", "test_path", "rows", "synthetic", "tokenizer", "tokenizer_revision"}
    keys = config.data.model_dump(mode="json", exclude=elsewhere | set(CachedData.model_fields))
    described = {"version": VERSION, "content": content, "keys": keys, "pretrained": config.model.pretrained}
    earlier = earlier_model(config)
    if earlier is not None:
        # Its labels may lack rows; its data, whose fingerprint holds that of the model before it, may hold ours.
        described["earlier"] = {"labels": sorted(earlier.labels), "data": earlier.data}
    tokenizer = describe_ready(config)
    return described if tokenizer is None else {**described, "tokenizer": tokenizer}


def build(config: Config, folder: Path, say: Say) -> dict[str, Any]:
    """Write the prepared files into `folder`; returns the facts. DataError, StorageError."""
    began = time.monotonic()
    sources = find_sources(config.data)
    root = config.data.cache_dir / "chunks"
    root.mkdir(parents=True, exist_ok=True)
    chunks.remove_stale(root)
    kept = chunks.size_of(root)
    check_space(config.data.cache_dir, sum(source.bytes_needed for source in sources), kept, say)
    say(f"data           reading {', '.join(source.where for source in sources)}")
    work = folder / "work"
    work.mkdir()
    tickets = Tickets(_read(config.data, sources, root, say), work)
    earlier = earlier_model(config)
    known = set(earlier.labels) if earlier else set()
    names, warnings = choose_labels(tickets, config.data, known)
    warnings += departures(names, known)
    every_label = tickets.labels(names)
    here = _Kept(every_label)
    labels = here.of(every_label)
    say(f"data           {len(labels)} tickets in {len(names)} classes; looking for near-duplicates")
    grouped = _group(tickets, here, work)
    own, times = tickets.own_split(config.data), _times(tickets, sources, config.data)
    own, times = (None if column is None else here.of(column) for column in (own, times))
    split_of, method = _split(own, times, labels, grouped, config.data)
    warnings += _check_split(split_of, labels, grouped, names, method, config.data, known)
    texts = here.of(tickets.column("texts", np.uint64))
    hashes = np.sort(texts)
    copies = int((hashes[1:] == hashes[:-1]).sum())
    leaks = {"exact_duplicates": copies, **split.leak_report(split_of, labels, grouped.groups)}
    write_trained(folder, texts[split_of == split.TRAIN])
    if earlier is not None:
        evaluated = {"validation": texts[split_of == split.VALIDATION], "test": texts[split_of == split.TEST]}
        leaks["rows_trained_before"], told = count_trained_before(earlier, evaluated)
        warnings += told
    crossing = sum(leaks["groups_crossing"].values())
    if crossing:
        warnings.append(f"{crossing} groups of near-duplicates lie on both sides of a split that was given")
    say("data           training the tokenizer and tokenising")
    (folder / "tokenizer").mkdir()
    teachers = here.positions(_teachers(split_of, own, times, labels, grouped, config.data))
    tokenizer = make_tokenizer(config, tickets.texts(teachers), folder / "tokenizer")
    lengths = _tokenise(tickets, folder, root, say)
    np.save(folder / "rows.npy", tickets.rows())
    np.save(folder / "labels.npy", every_label)
    np.save(folder / "starts.npy", tickets.starts)
    for index, name in enumerate(split.NAMES):
        np.save(folder / f"{name}.npy", here.positions(np.flatnonzero(split_of == index)))
    lengths = here.of(lengths)[split_of != split.DROPPED]
    shutil.rmtree(work)
    for warning in warnings:
        say(f"warning        {warning}")
    say(f"data           took {time.monotonic() - began:.1f} s")
    return {
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


def misfit(then: dict[str, Any], now: dict[str, Any]) -> str | None:
    """Why weights that were trained on data of the facts `then` cannot go on with that of `now`; None if they can."""
    if then["labels"] != now["labels"]:
        return "its queues are other ones. Start a new run."
    if then["vocabulary"] != now["vocabulary"]:
        return f"its vocabulary has {now['vocabulary']} entries instead of {then['vocabulary']}. Start a new run."
    return None


def lengths(folder: Path | str) -> Any:
    """Tokens of each training row, as a numpy array."""
    return np.load(Path(folder) / "lengths.npy", mmap_mode="r")[np.load(Path(folder) / "train.npy", mmap_mode="r")]


class _Kept:
    """The rows whose label stays; a row's number among them is not its position where labels were dropped."""

    def __init__(self, labels: np.ndarray) -> None:
        kept = labels >= 0
        self._at = None if kept.all() else np.flatnonzero(kept)

    def of(self, column: np.ndarray) -> np.ndarray:
        return column if self._at is None else column[self._at]

    def positions(self, rows: np.ndarray) -> np.ndarray:
        return rows if self._at is None else self._at[rows]


def _read(data: DataConfig, sources: list[Source], root: Path, say: Say) -> list[Part]:
    """Store every chunk that is not there yet."""
    named = dict.fromkeys(data.text_columns, "data.text_columns")
    named[data.label_column] = "data.label_column"
    optional = {"id_column": data.id_column, "time_column": data.time_column, "split_column": data.split_column}
    named |= {name: f"data.{key}" for key, name in optional.items() if name is not None}
    columns = Columns.of(data, _timed(sources, data))
    parts: list[Part] = []
    progress = _Progress(say, "rows")

    def jobs() -> Iterator[tuple[Any, ...]]:
        row = 0
        for source in sources:
            for chunk in source.chunks(named):
                part = Part(chunks.chunk_folder(root, chunk, columns), row, source.split)
                parts.append(part)
                row += chunk.rows
                progress.count(chunk.rows, is_whole(part.folder))
                if not is_whole(part.folder):
                    yield part.folder, chunk, columns, source.where, part.first_row

    for _ in map_in_workers(chunks.store, jobs()):
        progress.show()
    progress.end()
    return parts


def _tokenise(tickets: Tickets, folder: Path, root: Path, say: Say) -> np.ndarray:
    """Token ids of every chunk, linked into the folder with its texts. Returns the lengths."""
    file = folder / "tokenizer" / "tokenizer.json"
    tokenizer = file_hash(file)
    (folder / "chunks").mkdir()
    progress = _Progress(say, "tokens of rows")
    places = [root / f"tokens-{part.folder.name[5:]}-{tokenizer[:16]}" for part in tickets.parts]

    def jobs() -> Iterator[tuple[Any, ...]]:
        for part, place, rows in zip(tickets.parts, places, np.diff(tickets.starts).tolist(), strict=True):
            progress.count(rows, is_whole(place))
            if not is_whole(place):
                yield part.folder, file, place

    for _ in map_in_workers(chunks.tokenise, jobs()):
        progress.show()
    progress.end()
    lengths = np.lib.format.open_memmap(folder / "lengths.npy", "w+", np.int32, (len(tickets),))
    for index, (part, place) in enumerate(zip(tickets.parts, places, strict=True)):
        stem = str(folder / "chunks" / f"{index:06d}")
        _link(part.folder / "text.arrow", f"{stem}.arrow")
        for name in ("ids.npy", "offsets.npy"):
            _link(place / name, f"{stem}.{name}")
        lengths[tickets.starts[index] : tickets.starts[index + 1]] = np.diff(np.load(place / "offsets.npy"))
    return np.asarray(lengths)


def _link(file: Path, name: str) -> None:
    """One copy on the disk, which stays when the chunks are removed."""
    try:
        os.link(file, name)
    except OSError:  # a file system without links
        shutil.copyfile(file, name)


class _Progress:
    """Counts chunks, and says now and then how far it is."""

    def __init__(self, say: Say, what: str) -> None:
        self._say, self._what = say, what
        self._rows = self._chunks = self._kept = 0
        self._shown = time.monotonic()

    def count(self, rows: int, kept: bool) -> None:
        self._rows += rows
        self._chunks += 1
        self._kept += kept

    def show(self) -> None:
        if time.monotonic() - self._shown > _SAY_EVERY_S:
            self._say(f"data           {self._what}: {self._rows} so far, in {self._chunks} chunks")
            self._shown = time.monotonic()

    def end(self) -> None:
        new = self._chunks - self._kept
        self._say(f"data           {self._what}: {self._kept} of {self._chunks} chunks kept, {new} new")


def _group(tickets: Tickets, here: _Kept, work: Path) -> Grouped:
    sets, sketches = (here.of(tickets.column(name, np.uint64)) for name in ("sets", "sketches"))
    sizes = here.of(tickets.column("sizes", np.uint32))

    def words(row: int) -> frozenset[str]:
        return words_of(tickets.text(int(here.positions(np.array([row]))[0])))

    grouped = group(sets, sketches, sizes, lambda index: here.of(tickets.band(index)), words, work / "buckets")
    shutil.rmtree(work / "buckets", ignore_errors=True)  # small data has none
    return grouped


def _timed(sources: list[Source], data: DataConfig) -> bool:
    """Whether time tells the split: a split that is given goes before."""
    own = data.split_column is not None or any(source.split is not None for source in sources)
    return data.time_column is not None and not own


def _times(tickets: Tickets, sources: list[Source], data: DataConfig) -> np.ndarray | None:
    return tickets.column("times", np.float64) if _timed(sources, data) else None


def _split(
    own: np.ndarray | None, times: np.ndarray | None, labels: np.ndarray, grouped: Grouped, data: DataConfig
) -> tuple[np.ndarray, str]:
    together = data.near_duplicates == "group"
    alone = np.arange(len(labels), dtype=np.uint32)
    apart = grouped if together else Grouped(alone, alone)
    if own is not None:
        result = own
        for missing in (split.TEST, split.VALIDATION):
            if not (result == missing).any() and (missing == split.VALIDATION or data.split_column is None):
                result = split.carve(result, labels, apart, data, missing)
        return result, "column" if data.split_column else "files"
    if times is not None:
        result = split.by_time(times, data)
        return (split.drop_later_copies(result, grouped.groups) if together else result), "time"
    return split.stratified(labels, apart, data), "stratified"


def _teachers(
    split_of: np.ndarray,
    own: np.ndarray | None,
    times: np.ndarray | None,
    labels: np.ndarray,
    grouped: Grouped,
    data: DataConfig,
) -> np.ndarray:
    """The rows that the tokenizer learns from: those that train in the first block by itself and in all of the data. So
    rows that are appended do not change it, and no other split teaches the vocabulary."""
    if len(labels) <= BLOCK_ROWS:
        return np.flatnonzero(split_of == split.TRAIN)
    block = slice(0, BLOCK_ROWS)
    first = Grouped(grouped.then[block], grouped.then[block])
    own, times = (None if column is None else column[block] for column in (own, times))
    alone, _ = _split(own, times, labels[block], first, data)
    rows = np.flatnonzero((alone == split.TRAIN) & (split_of[block] == split.TRAIN))
    # A source whose first block holds no training rows, such as one sorted by split.
    return rows if len(rows) else np.flatnonzero(split_of == split.TRAIN)[:BLOCK_ROWS]


def _check_split(
    split_of: np.ndarray,
    labels: np.ndarray,
    grouped: Grouped,
    names: list[str],
    method: str,
    data: DataConfig,
    known: Collection[str],
) -> list[str]:
    """DataError for splits that cannot be trained or scored; warnings. known: labels that an earlier model knows."""
    if method == "column" and not (split_of == split.TEST).any():
        raise DataError("the given split has no test rows: give some, or let the toolkit split all of it.")
    for index, name in enumerate(split.NAMES):
        if not (split_of == index).any():
            groups = int((grouped.groups == np.arange(len(labels))).sum())
            raise DataError(
                f"the {name} split ({method}) is empty: {len(labels)} rows in {groups} groups of near-duplicates are "
                "too few for these shares."
            )
    trained = np.bincount(labels[split_of == split.TRAIN], minlength=len(names)) > 0
    missing = [name for name, has_rows in zip(names, trained, strict=True) if not has_rows]
    for index in (split.VALIDATION, split.TEST):
        here = {names[label] for label in np.unique(labels[split_of == index])}
        unknown = [name for name in missing if name in here and name not in known]
        if unknown:
            raise DataError(
                f"the {split.NAMES[index]} split has classes that training lacks: "
                f"{', '.join(map(repr, unknown[:10]))}.\n"
                "A model cannot predict them: move some of their rows into training, or leave them out with "
                "data.drop_labels_below."
            )
    return check_missing(missing, known, pinned=data.labels is not None)


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
