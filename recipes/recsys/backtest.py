"""How a model ages: the same recipe trained up to several moments, each tested on all that came after. Torch-free.

A late period can be harder than an early one, for any model. So models are compared on the same period: one that was
trained up to its begin against those that were trained periods earlier.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dist_train import plots
from dist_train.errors import ConfigError, DataError
from dist_train.metrics import interval
from dist_train.score import Score
from recipes.recsys.clock import DAY_MS, read_moment, shown
from recipes.recsys.config import Config
from recipes.recsys.measures import ndcg, ranks_of
from recipes.recsys.predictions import header_of
from recipes.recsys.stored import StoredSessions


@dataclass(frozen=True)
class Cut:
    """One model of a backtest."""

    name: str
    title: str
    validation_from: int
    """Milliseconds since 1970; the training ends here."""
    test_from: int
    settings: tuple[str, ...]


def make_cuts(prepared: Path, config: Config, count: int) -> list[Cut]:
    """`count` moments, data.period_days apart, the last one such a period before the end of the log. The validation
    split of each is as long as that of the recipe. ConfigError where the log is too short or has no times."""
    stored = StoredSessions(prepared)
    if stored.times is None or stored.facts["cuts"] is None:
        raise ConfigError(
            f"a backtest needs the times of events, but data.kind is {config.data.kind} and data.split "
            f"{config.data.split}: give events with times, and set data.split to time.",
            "data.kind",
        )
    data = config.data
    period = round(data.period_days * DAY_MS)
    begin, end = int(stored.times.min()), int(stored.times.max()) + 1
    if data.test_until is not None:
        end = read_moment(data.test_until, "data.test_until")
    validation, test = stored.facts["cuts"]
    length = test - validation
    tests = [end - (count - index) * period for index in range(count)]
    if tests[0] - length <= begin:
        raise ConfigError(
            f"{count} cuts of {data.period_days:g} days with {length / DAY_MS:.1f} days of validation before the first "
            f"one need a longer log than from {shown(begin)} to {shown(end)}: lower --cuts or data.period_days.",
            "data.period_days",
        )
    return [
        Cut(
            f"to-{_stamp(moment)}",
            f"training until {shown(moment - length)}, asked from {shown(moment)} on",
            moment - length,
            moment,
            (
                f"data.validation_from={_iso(moment - length)}",
                f"data.test_from={_iso(moment)}",
                f"data.test_until={_iso(end)}",
            ),
        )
        for moment in tests
    ]


def compare_ages(
    cuts: Sequence[Cut], tables: Mapping[str, pa.Table], score: Score, samples: int, tolerance: float
) -> dict[str, Any]:
    """Of the test predictions of each cut: NDCG by the model's age, how far it falls below a model of age 0 on the same
    rows (paired, over users), and after how many periods to train again: as many as lose at most the share `tolerance`
    of the fresh model's NDCG on average."""
    first = tables[cuts[0].name]
    period = round(header_of(first).period_days * DAY_MS)
    keys = _keys(first, cuts[0])
    period_of = (keys - cuts[0].test_from) // period
    values = np.full((len(cuts), len(keys)), np.nan)
    for index, cut in enumerate(cuts):
        table = tables[cut.name]
        here = period_of >= index
        if not (np.array_equal(keys[here], _keys(table, cut)) and _users(first, here) == _users(table)):
            raise DataError(f"{cut.name} was tested on other rows than {cuts[0].name}: start the backtest anew.")
        values[index, here] = ndcg(ranks_of(table), header_of(table).k)
    every = np.arange(len(keys))
    fresh = values[period_of, every]
    aged = {age: np.where(period_of >= age, values[period_of - age, every], np.nan) for age in range(len(cuts))}
    drawn = [_of_ages(fresh, aged, weights) for weights in (np.ones(len(keys)), *score.draws(first, samples))]
    shapes = {name: np.array([each[name] for each in drawn]) for name in drawn[0]}
    entries = {name: interval(float(each[0]), each[1:]) for name, each in shapes.items()}
    ages: list[dict[str, Any]] = [
        {
            "age": age,
            "rows": int((period_of >= age).sum()),
            "ndcg": entries[f"ndcg/{age}"],
            "fall": entries[f"fall/{age}"],
            "mean_fall": entries[f"mean_fall/{age}"],
        }
        for age in aged
    ]
    by_period = [
        [_mean(values[model, period_of == place]) if place >= model else None for place in range(len(cuts))]
        for model in range(len(cuts))
    ]
    kept = [age["age"] + 1 for age in ages if shapes[f"mean_fall/{age['age']}"][0] <= tolerance * np.mean(fresh)]
    return {
        "period_days": header_of(first).period_days,
        "validation_days": (cuts[0].test_from - cuts[0].validation_from) / DAY_MS,
        "cuts": [cut.title for cut in cuts],
        "ages": ages,
        "ndcg_by_model_and_period": by_period,
        "tolerance": tolerance,
        "retrain_every_periods": _without_a_break(kept),
    }


def sentences(result: Mapping[str, Any]) -> list[str]:
    """What it says of ageing, and after how long to train again."""
    days, ages = result["period_days"], result["ages"]
    lines = []
    for entry in ages[1:]:
        fall = entry["fall"]
        verb = "is worse" if fall["low"] > 0 else "is BETTER" if fall["high"] < 0 else "is not shown to be worse"
        lines.append(
            f"A model that is {entry['age'] * days:g} days older {verb}: NDCG falls by {fall['value']:+.4f} "
            f"[{fall['low']:+.4f}, {fall['high']:+.4f}] on the same {entry['rows']:,} rows."
        )
    every = result["retrain_every_periods"]
    lost = ages[every - 1]["mean_fall"]
    longest = "" if every < len(ages) else ", the longest that was looked at,"
    lines.append(
        f"Training anew every {every * days:g} days{longest} loses {lost['value']:+.4f} "
        f"[{lost['low']:+.4f}, {lost['high']:+.4f}] NDCG on average against every {days:g} days: the longest interval "
        f"that loses at most {100 * result['tolerance']:g} %."
    )
    length = result["validation_days"]
    lines.append(f"Age 0 begins {length:.1f} days after the end of the training, where the validation split ends.")
    return lines


def table_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """A header, and a line an age."""
    rows = [["age of the model", "rows", "NDCG", "below a fresh one, same rows", "mean, trained anew after that"]]
    for entry in result["ages"]:
        shown_age = f"{entry['age'] * result['period_days']:g} days"
        values = (entry["ndcg"], entry["fall"], entry["mean_fall"])
        texts = (f"{value['value']:.4f} [{value['low']:.4f}, {value['high']:.4f}]" for value in values)
        rows.append([shown_age, f"{entry['rows']:,}", *texts])
    return rows


def figure(result: Mapping[str, Any]) -> bytes:
    """SVG. Left NDCG of each model over the periods after it; right how far one falls below a fresh one by age, paired,
    on the same rows."""
    drawn, (left, right) = plots.make_axes(2, 9.6, 3.2)
    for title, values in zip(result["cuts"], result["ndcg_by_model_and_period"], strict=True):
        points = [(place, value) for place, value in enumerate(values) if value is not None]
        left.plot(*zip(*points, strict=True), marker=".", label=title)
    left.set(xlabel="period", ylabel="NDCG")
    left.legend(fontsize=7)
    for entry in result["ages"]:
        days, fall = entry["age"] * result["period_days"], entry["fall"]
        right.plot([days, days], [fall["low"], fall["high"]], color=plots.COLOURS[0], linewidth=1)
        right.plot(days, fall["value"], "o", color=plots.COLOURS[0], markersize=4)
    right.axhline(0, color="0.7", linewidth=1)
    right.set(xlabel="age of the model in days", ylabel="NDCG below a fresh model")
    return plots.svg(drawn)


def _of_ages(fresh: np.ndarray, aged: Mapping[int, np.ndarray], weights: np.ndarray) -> dict[str, float]:
    result = {}
    falls: list[float] = []
    for age, values in aged.items():
        known = np.isfinite(values)
        # A draw without such rows says nothing of them.
        total = weights[known].sum() or np.nan
        result[f"ndcg/{age}"] = float(weights[known] @ values[known] / total)
        falls.append(float(weights[known] @ (fresh - values)[known] / total))
        result[f"fall/{age}"] = falls[-1]
        # Trained anew after this age, the model is as often of each age up to it.
        result[f"mean_fall/{age}"] = float(np.mean(falls))
    return result


def _keys(table: pa.Table, cut: Cut) -> np.ndarray:
    """When each row was asked for: milliseconds since 1970."""
    return np.rint(table["age_days"].to_numpy() * DAY_MS).astype(np.int64) + cut.validation_from


def _users(table: pa.Table, chosen: np.ndarray | None = None) -> list[str]:
    column = table["user"] if chosen is None else table["user"].filter(pa.array(chosen))
    users: list[str] = column.to_pylist()
    return users


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def _without_a_break(counts: Sequence[int]) -> int:
    """The last of 1, 2, 3 … before the first that is missing."""
    longest = 1
    while longest + 1 in counts:
        longest += 1
    return longest


def _iso(moment: int) -> str:
    return datetime.fromtimestamp(moment / 1000, UTC).isoformat(timespec="milliseconds")


def _stamp(moment: int) -> str:
    return datetime.fromtimestamp(moment / 1000, UTC).strftime("%Y%m%d-%H%M%S")
