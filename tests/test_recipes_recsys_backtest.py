"""Models of several ages are compared on the same periods, and the retraining interval follows."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from dist_train import config_io
from dist_train.errors import ConfigError, DataError
from dist_train.prepared import prepare
from dist_train.recipe import load_recipe
from recipes.recsys.backtest import Cut, compare_ages, make_cuts, sentences
from recipes.recsys.clock import DAY_MS
from recipes.recsys.predictions import Header
from tests.sessions import SETTINGS, write_log

SCORE = load_recipe("recsys").score
WEEK = 7 * DAY_MS


def _cut(index: int) -> Cut:
    return Cut(f"cut{index}", "", index * WEEK, index * WEEK, ())


def _table(cut: int, above: list[int], periods: list[int]) -> pa.Table:
    """A row a period of the whole log; those before the cut are left out."""
    rows = [place for place, period in enumerate(periods) if period >= cut]
    table = pa.table(
        {
            "user": [f"u{place}" for place in rows],
            "age_days": [7.0 * (periods[place] - cut) + 1 for place in rows],
            "above": [[above[place]] for place in rows],
            "tied": [[1] for _ in rows],
        }
    )
    header = Header(k=10, items=100, events=100, period_days=7.0)
    return table.replace_schema_metadata({b"header": json.dumps(asdict(header)).encode()})


def test_a_fall_is_measured_on_the_same_rows_and_not_between_easy_and_hard_periods() -> None:
    periods = [0] * 20 + [1] * 20
    # The second week is hard: a target stands second for the fresh model too, and fourth for the old one.
    tables = {
        "cut0": _table(0, [0] * 20 + [3] * 20, periods),
        "cut1": _table(1, [0] * 20 + [1] * 20, periods),
    }
    result = compare_ages([_cut(0), _cut(1)], tables, SCORE, 50, 0.02)
    second, fourth = 1 / np.log2(3), 1 / np.log2(5)
    assert result["ages"][0]["ndcg"]["value"] == pytest.approx((1 + second) / 2)
    assert result["ages"][1]["fall"]["value"] == pytest.approx(second - fourth)
    assert result["ages"][1]["mean_fall"]["value"] == pytest.approx((second - fourth) / 2)
    assert result["ndcg_by_model_and_period"] == [[1.0, pytest.approx(fourth)], [None, pytest.approx(second)]]
    assert result["retrain_every_periods"] == 1
    told = sentences(result)
    assert "7 days older is worse" in told[0]
    assert told[-2].startswith("Training anew every 7 days loses +0.0000 [")
    assert told[-1].startswith("Age 0 begins 0.0 days after")


def test_a_model_that_does_not_age_need_not_be_trained_anew() -> None:
    periods = [0] * 20 + [1] * 20
    tables = {f"cut{index}": _table(index, [1] * 40, periods) for index in (0, 1)}
    result = compare_ages([_cut(0), _cut(1)], tables, SCORE, 50, 0.02)
    assert result["retrain_every_periods"] == 2
    assert "not shown to be worse" in sentences(result)[0]
    assert "14 days, the longest that was looked at, loses" in sentences(result)[-2]


def test_runs_over_other_rows_are_not_compared() -> None:
    tables = {"cut0": _table(0, [0] * 4, [0, 0, 1, 1]), "cut1": _table(1, [0] * 5, [0, 0, 1, 1, 1])}
    with pytest.raises(DataError, match="other rows"):
        compare_ages([_cut(0), _cut(1)], tables, SCORE, 10, 0.02)


def test_cuts_are_a_period_apart_and_each_split_is_made_at_them(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    write_log(tmp_path)
    config: Any = config_io.load("recsys", list(SETTINGS), site=False).config
    recipe = load_recipe(config.recipe)
    base = prepare(config, recipe, lambda text: None)
    cuts = make_cuts(base, config, 2)
    assert cuts[1].test_from - cuts[0].test_from == WEEK
    for cut in cuts:
        own: Any = config_io.load("recsys", [*SETTINGS, *cut.settings], site=False).config
        facts = recipe.data.load_facts(prepare(own, recipe, lambda text: None))
        assert facts["cuts"] == [cut.validation_from, cut.test_from]
    with pytest.raises(ConfigError, match="lower --cuts or data"):
        make_cuts(base, config, 50)


def test_a_log_without_times_has_no_cuts(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sequences.csv").write_text("user_id,items\n" + "".join(f"u{n},a b c d e\n" for n in range(5)))
    words = ["data.path=sequences.csv", "data.kind=sequences", "data.split=leave_one_out", "model.items=id"]
    config: Any = config_io.load("recsys", [*words, "data.cache_dir=prepared"], site=False).config
    prepared = prepare(config, load_recipe(config.recipe), lambda text: None)
    with pytest.raises(ConfigError, match="needs the times of events"):
        make_cuts(prepared, config, 2)
