"""Recommendation as a task: sessions from the prepared folder, the model of the config, lists for new sessions."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from dist_train.errors import DataError
from dist_train.model_folder import write_state
from dist_train.prepared import load_facts
from dist_train.records import check_record
from dist_train.task import Batch, ListedRows
from recipes.recsys.clock import Clock
from recipes.recsys.config import Config
from recipes.recsys.data import chosen_loss, row_lengths
from recipes.recsys.embeddings import write_embeddings
from recipes.recsys.log import read_list
from recipes.recsys.model import Catalogue, Recommender
from recipes.recsys.predictions import make_table
from recipes.recsys.problems import Problems
from recipes.recsys.rules import FILE as RULES_FILE
from recipes.recsys.rules import read_rules
from recipes.recsys.sessions import BEGIN, FIRST, STOP
from recipes.recsys.stored import StoredSessions, gap_buckets, read_content, read_items

CATALOGUE_FILES = ("items.arrow", "numbers.npy", "categories.npy", "content.json", "content_axes.npy")
"""What of the prepared folder every model folder needs."""
_NONE = np.zeros(0, dtype=np.int64)


class Example(NamedTuple):
    """A session as it is collated."""

    items: np.ndarray
    """What the model reads: [events] int64."""
    gaps: np.ndarray
    """Bucket of the pause before each of them: [events] int64."""
    targets: np.ndarray
    """[targets] int64."""
    shares: np.ndarray
    """In training what each target counts: [targets] float32."""
    before: np.ndarray = _NONE
    """In training how many of `items` each target is predicted from: [targets] int64."""
    seen: np.ndarray = _NONE
    """In evaluation all items of the session: [any] int64."""
    moment: int = 0
    """Milliseconds since 1970."""
    appeared: np.ndarray = np.zeros(0, dtype=np.int32)
    """In training how many trained items had appeared when each target came: [targets] int32."""
    trains: bool = False


def make_task(config: Config, prepared: Path) -> RecommendationTask:
    return RecommendationTask(config, prepared)


class RecommendationTask:
    def __init__(self, config: Config, prepared: Path) -> None:
        self.config = config
        self.prepared = prepared
        self.facts = load_facts(prepared)

    def build_model(self) -> Recommender:
        model, task, facts = self.config.model, self.config.task, self.facts
        numbers = categories = None
        if model.items != "id":
            numbers, categories = (torch.from_numpy(np.array(values)) for values in read_content(self.prepared))
        items = read_items(self.prepared)
        catalogue = Catalogue(
            model.width,
            facts["trained_items"],
            numbers,
            categories,
            facts["category_sizes"] if model.items != "id" else [],
            model.items != "content",
            model.id_dropout,
            model.content_scale,
        )
        available = None
        if facts["has_availability"]:
            columns = [np.append(0, items[name].to_numpy()) for name in ("available_from", "available_until")]
            available = (torch.from_numpy(columns[0]), torch.from_numpy(columns[1]))
        return Recommender(
            catalogue,
            model,
            facts["longest"],
            items.num_rows,
            task.list_length,
            task.mask_seen,
            self._log_shares(items) if self.is_sampled else None,
            task.negatives,
            available,
            None if self._appears is None else torch.from_numpy(_order_of(self._appears)),
            self._rules(),
        )

    @property
    def is_sampled(self) -> bool:
        return chosen_loss(self.config, self.facts["trained_items"]) == "sampled"

    def rows(self, split: str) -> SessionRows:
        return SessionRows(self, split)

    def collate(self, rows: list[Example], seeds: np.ndarray) -> Batch:
        longest = max(len(row.items) for row in rows)
        items, gaps = _padded([row.items for row in rows], longest), _padded([row.gaps for row in rows], longest)
        batch = {"items": items, "gaps": torch.nn.functional.pad(gaps, (1, 0))}
        if rows[0].trains:
            sizes = [len(row.targets) for row in rows]
            place = [index * (longest + 1) + row.before for index, row in enumerate(rows)]
            return {
                **batch,
                "place": torch.from_numpy(np.concatenate(place)),
                "target": torch.from_numpy(np.concatenate([row.targets for row in rows])),
                "row": torch.from_numpy(np.repeat(np.arange(len(rows)), sizes)),
                "appeared": torch.from_numpy(np.concatenate([row.appeared for row in rows])),
                "share": torch.from_numpy(np.concatenate([row.shares for row in rows])),
            }
        most = max(1, *(len(row.targets) for row in rows))
        return {
            **batch,
            "last": torch.tensor([len(row.items) for row in rows]),
            "asked": _padded([row.targets for row in rows], most),
            "seen": _padded([row.seen for row in rows], max(len(row.seen) for row in rows)),
            "moment": torch.tensor([row.moment for row in rows]),
            "most_targets": torch.zeros(len(rows), self._most_targets, dtype=torch.int8),
        }

    def example_batch(self, rows: int, length: int) -> Batch:
        events = np.ones(length - 1, dtype=np.int64)
        targets, before = np.ones(length, dtype=np.int64), np.arange(length)
        shares, appeared = np.ones(length, dtype=np.float32), np.ones(length, dtype=np.int32)
        seen = events if self.config.task.mask_seen else _NONE
        example = Example(events, events, targets, shares, before, seen=seen, appeared=appeared, trains=True)
        # For the memory of training and of evaluation: a row has what both read.
        seeds = np.zeros(rows, dtype=np.uint64)
        most = targets[: self._most_targets]
        return {
            **self.collate([example._replace(targets=most, trains=False)] * rows, seeds),
            **self.collate([example] * rows, seeds),
        }

    def predictions(self, split: str, outputs: dict[str, np.ndarray]) -> pa.Table:
        return make_table(StoredSessions(self.prepared), split, outputs, self.config)

    def encode(self, records: list[dict[str, Any]]) -> ListedRows:
        """records: `history`, items oldest first; perhaps `times` of them, and `time`, when the list is asked for."""
        data = self.config.data
        examples = []
        for record in records:
            check_record(record, [data.history_column])
            names = read_list(record[data.history_column])
            codes = np.array([self._codes.get(name, 0) for name in names], dtype=np.int64)
            times = self._times(record, len(names))
            known = codes > 0  # an item that is in no table is read over
            codes = codes[known]
            moment = self._moment(record, times)
            last = self.facts["longest"]
            gaps = np.zeros(len(codes), dtype=np.int64) if times is None else gap_buckets(times[known][-last:])
            no_shares = np.zeros(0, dtype=np.float32)
            examples.append(Example(codes[-last:], gaps[-last:], _NONE, no_shares, seen=codes, moment=moment))
        return ListedRows(examples, np.array([len(example.items) + 1 for example in examples], dtype=np.int64))

    def answers(self, outputs: dict[str, np.ndarray], decision: Mapping[str, Any]) -> pa.Table:
        best = outputs["best"]
        names, filled = self._names, best > 0
        return pa.table(
            {
                "items": pa.array(
                    [[names[item] for item in row[keep]] for row, keep in zip(best, filled, strict=True)]
                ),
                "scores": pa.array(
                    [row[keep].tolist() for row, keep in zip(outputs["best_score"], filled, strict=True)],
                    pa.list_(pa.float32()),
                ),
            }
        )

    def save_model(self, model: nn.Module, folder: Path) -> None:
        """The state, what the items are, and their vectors for a vector index."""
        assert isinstance(model, Recommender)
        write_state(folder, model)
        for name in (*CATALOGUE_FILES, *([RULES_FILE] if self.config.model.rules_share else [])):
            shutil.copyfile(self.prepared / name, folder / name)
        write_embeddings(model, read_items(self.prepared), folder)

    def _times(self, record: Mapping[str, Any], count: int) -> np.ndarray | None:
        if record.get("times") is None:
            return None
        times = _moments("times", read_list(record["times"]))
        if len(times) != count:
            raise DataError(f"a row to predict has {count} items in its history, but {len(times)} times: {record}.")
        return times

    def _moment(self, record: Mapping[str, Any], times: np.ndarray | None) -> int:
        """When the list is asked for: `time`, else after the last event, else now, at the end of the log."""
        if record.get("time") is not None:
            return int(_moments("time", [str(record["time"])])[0])
        return int(times[-1]) if times is not None and len(times) else int(self.facts["log_ends"])

    @functools.cached_property
    def _appears(self) -> np.ndarray | None:
        """When each trained item appeared: [trained] int64. None where there are no times."""
        if not self.facts["has_times"]:
            return None
        return read_items(self.prepared)["appears"].to_numpy()[: self.facts["trained_items"]]

    @functools.cached_property
    def _names(self) -> list[str]:
        return ["", *read_items(self.prepared)["id"].to_pylist()]

    @functools.cached_property
    def _codes(self) -> dict[str, int]:
        return {name: code for code, name in enumerate(self._names) if code}

    @property
    def _most_targets(self) -> int:
        return max(self.facts["most_targets"].values())

    def _rules(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        if not self.config.model.rules_share:
            return None
        after, value = read_rules(self.prepared)
        return torch.from_numpy(after), torch.from_numpy(value)

    def _log_shares(self, items: pa.Table) -> torch.Tensor:
        counts = items["count"].to_numpy()[: self.facts["trained_items"]]
        return torch.from_numpy(np.log(counts / counts.sum())).float()


class SessionRows:
    """The rows of one split."""

    def __init__(self, task: RecommendationTask, split: str) -> None:
        self._stored = StoredSessions(task.prepared)
        self._trains = split == "train"
        self._appears = None if task._appears is None else np.sort(task._appears)
        self._rows = self._stored.rows(split)
        self._longest = task.facts["longest"]
        self._reads_all = task.config.task.mask_seen
        self.ids = np.arange(len(self._rows), dtype=np.int64)
        self.lengths = row_lengths(self._rows, self._longest)
        self.weights = self._row_weights() if self._trains else np.ones(len(self._rows))

    def take(self, indices: np.ndarray) -> list[Example]:
        return [self._train(row) if self._trains else self._held_out(row) for row in self._rows[indices]]

    def _train(self, row: np.ndarray) -> Example:
        stored = self._stored
        stop = int(row[STOP])
        start = max(int(row[BEGIN]), stop - 1 - self._longest)
        targets = slice(int(row[FIRST]), stop)
        weights = stored.weights[targets] if stored.weights is not None else np.ones(stop - int(row[FIRST]))
        shares = np.asarray(weights / weights.sum(), dtype=np.float32)
        return Example(
            stored.items[start : stop - 1].astype(np.int64),
            self._gaps(start, stop - 1),
            stored.items[targets].astype(np.int64),
            shares,
            self._before(start, targets),
            appeared=self._appeared(targets),
            trains=True,
        )

    def _held_out(self, row: np.ndarray) -> Example:
        stored, first = self._stored, int(row[FIRST])
        start = max(int(row[BEGIN]), first - self._longest)
        seen = stored.items[int(row[BEGIN]) : first] if self._reads_all else stored.items[:0]
        return Example(
            stored.items[start:first].astype(np.int64),
            self._gaps(start, first),
            stored.items[first : int(row[STOP])].astype(np.int64),
            np.zeros(0, dtype=np.float32),
            seen=np.unique(seen).astype(np.int64),
            moment=int(stored.moment(row[None])[0]),
        )

    def _gaps(self, start: int, stop: int) -> np.ndarray:
        if self._stored.times is None:
            return np.zeros(stop - start, dtype=np.int64)
        return gap_buckets(np.asarray(self._stored.times[start:stop]))

    def _before(self, start: int, targets: slice) -> np.ndarray:
        """Events from `start` on that each target is predicted from: those before its moment, as when it is tested. At
        the begin of a session, where there are none, those that stand before it: what is taken together goes together.
        """
        place = np.arange(targets.start, targets.stop)
        if self._stored.times is not None:
            times = self._stored.times[start : targets.stop]
            earlier = start + np.searchsorted(times, times[targets.start - start :])
            place = np.where(earlier > start, earlier, place)
        return place - start

    def _appeared(self, targets: slice) -> np.ndarray:
        if self._appears is None or self._stored.times is None:
            return np.zeros(targets.stop - targets.start, dtype=np.int32)
        return np.searchsorted(self._appears, self._stored.times[targets], side="right").astype(np.int32)

    def _row_weights(self) -> np.ndarray:
        """What its targets count together."""
        rows = self._rows
        if self._stored.weights is None:
            return (rows[:, STOP] - rows[:, FIRST]).astype(np.float64)
        total = np.concatenate([[0.0], np.cumsum(self._stored.weights, dtype=np.float64)])
        return total[rows[:, STOP]] - total[rows[:, FIRST]]


def _order_of(appears: np.ndarray) -> np.ndarray:
    """Which came first, second …: [items] int32. Items of one moment come in any order, since all of them had appeared
    when any event of that moment came."""
    order = np.empty(len(appears), dtype=np.int32)
    order[np.argsort(appears, kind="stable")] = np.arange(len(appears), dtype=np.int32)
    return order


def _padded(rows: list[np.ndarray], width: int) -> torch.Tensor:
    padded = np.zeros((len(rows), width), dtype=np.int64)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    return torch.from_numpy(padded)


def _moments(name: str, texts: list[str]) -> np.ndarray:
    problems = Problems()
    times = Clock(name).read(texts, [name] * len(texts), problems)
    problems.check("The rows to predict need times as the log has them.")
    return times
