"""The report's own figures: quality by bucket, by the age of the model, and what the lists hold. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dist_train import plots
from recipes.recsys.measures import coverage, measure_lists
from recipes.recsys.predictions import fixed_lists, header_of, ragged
from recipes.recsys.stored import StoredSessions, read_items

_BUCKETS = (("frequency", "training events of the target"), ("history", "events before it"), ("user", "user"))
_SESSIONS, _SHOWN_EVENTS = 6, 4
_CHARACTERS = 46


def figures(tables: Mapping[str, pa.Table], groups: Mapping[str, Any], prepared: Path) -> list[dict[str, str]]:
    """tables: test predictions of model and baselines; groups: the model's metrics by bucket."""
    pictures = [_buckets(tables, groups)]
    if len(groups.get("age", {})) > 1:
        pictures.append(_ages(groups["age"]))
    return [*pictures, _lists(tables), _sessions(tables["model"], prepared)]


def _buckets(tables: Mapping[str, pa.Table], groups: Mapping[str, Any]) -> dict[str, str]:
    figure, every = plots.make_axes(len(_BUCKETS), 9.6, 3.2)
    others = {name: measure_lists(table)(np.ones(table.num_rows)) for name, table in tables.items() if name != "model"}
    for axes, (kind, label) in zip(every, _BUCKETS, strict=True):
        entries = groups[kind]
        names = list(entries)
        values = [entries[name]["ndcg"] for name in names]
        places = np.arange(len(names))
        axes.bar(places, [entry["value"] or 0 for entry in values], color=plots.COLOURS[0], label="model", width=0.6)
        for place, entry in zip(places, values, strict=True):
            if entry["value"] is not None:
                axes.plot([place, place], [entry["low"], entry["high"]], color="black", linewidth=1)
        for (other, metrics), mark in zip(others.items(), "os^D", strict=False):
            axes.plot(places, [metrics[f"{kind}/{name}/ndcg"] for name in names], mark, label=other, markersize=4)
        axes.set_xticks(places, [f"{name}\n({entries[name]['rows']})" for name in names], fontsize=7)
        axes.set(xlabel=label, ylabel="NDCG")
    every[0].legend(fontsize=7)
    caption = "NDCG of the test split by bucket, with 95 % intervals of the model; how many there are in brackets."
    return plots.picture(figure, "Quality by bucket", caption)


def _ages(entries: Mapping[str, Any]) -> dict[str, str]:
    figure, (axes,) = plots.make_axes(1, 5.2, 3.0)
    known = [(int(name), entry["ndcg"]) for name, entry in entries.items() if entry["ndcg"]["value"] is not None]
    axes.plot([age for age, _ in known], [entry["value"] for _, entry in known], color=plots.COLOURS[0], marker=".")
    for age, entry in known:
        axes.plot([age, age], [entry["low"], entry["high"]], color=plots.COLOURS[0], linewidth=1)
    axes.set(xlabel="periods (data.period_days) since the end of the training", ylabel="NDCG", ylim=(0, None))
    caption = (
        "NDCG of the test split by the age of the model. Periods differ in how hard they are too: dist-train backtest"
    )
    return plots.picture(figure, "Age of the model", f"{caption} tells both apart.")


def _lists(tables: Mapping[str, pa.Table]) -> dict[str, str]:
    figure, (axes,) = plots.make_axes(1, 5.2, 2.6)
    names = list(tables)
    axes.barh(names, [coverage(tables[name]) for name in names], color=plots.COLOURS[0])
    axes.invert_yaxis()
    axes.set(xlabel="share of the catalogue that stands in a list", xlim=(0, 1))
    return plots.picture(figure, "Coverage", "Share of all items that stand in at least one list of the test split.")


def _sessions(table: pa.Table, prepared: Path) -> dict[str, str]:
    """Some sessions with the titles of what was read, what came and what was recommended: spread over all rows."""
    stored, titles = StoredSessions(prepared), ["", *read_items(prepared)["title"].to_pylist()]
    rows = stored.rows("test")
    chosen = np.unique(np.linspace(0, table.num_rows - 1, _SESSIONS).astype(int))
    best = fixed_lists(table, "best")
    targets, of_row = ragged(table, "target")
    figure, every = plots.make_grid(len(chosen), 1, 9.6, 1.5 * len(chosen))
    for (axes,), row in zip(every, chosen.tolist(), strict=True):
        axes.axis("off")
        came = set(targets[of_row == row].tolist())
        columns = (
            ("read, last first", stored.history(rows[row], _SHOWN_EVENTS)[::-1].tolist()),
            ("came", sorted(came)[:_SHOWN_EVENTS]),
            ("recommended", [item for item in best[row][: header_of(table).k].tolist() if item][: _SHOWN_EVENTS + 1]),
        )
        for place, (label, items) in enumerate(columns):
            axes.text(place / 3, 1.0, label, fontsize=7, fontweight="bold", va="top")
            for line, item in enumerate(items):
                weight = "bold" if place == 2 and item in came else "normal"
                text = plots.plain(titles[item][:_CHARACTERS]) if titles[item] else "(no title)"
                axes.text(place / 3, 0.82 - 0.17 * line, text, fontsize=6.5, va="top", fontweight=weight)
    caption = "Sessions of the test split, taken at even distances; a recommended item that came is printed bold."
    return plots.picture(figure, "Some sessions", caption)
