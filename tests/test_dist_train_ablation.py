"""The ladder of a recipe: its rungs build on each other, and its table says what each adds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from dist_train.ablation import Rung, compare_rungs, make_grid, parse_ladder, verdicts
from dist_train.config import RunConfig
from dist_train.errors import ConfigError
from dist_train.score import Score
from launcher.ablate import Study

PLAIN, SECOND, THIRD = (Rung(name, ("a=1",)) for name in ("plain", "+ second", "+ third"))


def _measure(table: pa.Table) -> Callable[[np.ndarray], dict[str, float]]:
    right = table["right"].to_numpy()
    return lambda weights: {"accuracy": float(weights @ right / weights.sum()), "unshown": 0.0}


SCORE = Score("accuracy", _measure, ("accuracy",), headline=("accuracy",), compared=("accuracy", "of another task"))


def _table(right: list[int], **more: list[str]) -> pa.Table:
    return pa.table({"row": range(len(right)), "right": np.array(right, dtype=float), **more})


def _config(*ladder: str) -> RunConfig:
    return RunConfig(recipe="tiny", ladder=list(ladder))


def test_a_rung_has_the_settings_of_all_before_it() -> None:
    rungs = parse_ladder(_config("plain: a.x=1 a.y=[1,2]", "+ more, 'quoted': a.x=2", "+ last: b='two words'"))
    assert [rung.name for rung in rungs] == ["plain", "+ more, 'quoted'", "+ last"]
    assert rungs[2].settings == ("a.x=1", "a.y=[1,2]", "a.x=2", "b=two words")
    assert [rung.slug for rung in rungs] == ["plain", "more-quoted", "last"]


@pytest.mark.parametrize(
    ("ladder", "message"),
    [
        (["plain: a=1"], "no ladder of two rungs"),
        (["plain: a=1", "without settings"], "'without settings' is not of the form"),
        (["plain: a=1", "+ b: c"], r"'\+ b: c' is not of the form"),
        (["plain: a=1", "+ b: c='"], "cannot be read"),
        (["a b: a=1", "+ a, b: a=2"], "needs a name that differs"),
    ],
)
def test_a_ladder_that_is_none_is_refused(ladder: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_ladder(_config(*ladder))
    with pytest.raises(ConfigError, match="no ladder"):
        parse_ladder(RunConfig(recipe="tiny"))


def test_every_rung_has_one_run_before_any_has_two() -> None:
    grid = make_grid([PLAIN, SECOND], 2)
    assert [(cell.index, cell.name) for cell in grid] == [
        (0, "plain-s0"), (1, "second-s0"), (2, "plain-s1"), (3, "second-s1"),
    ]  # fmt: skip


def test_means_spreads_and_differences_are_those_of_a_calculation_by_hand() -> None:
    tables = {
        ("plain", 0): _table([1, 0, 0, 0]),
        ("plain", 1): _table([1, 1, 0, 0]),
        ("+ second", 0): _table([1, 1, 1, 0]),
        ("+ second", 1): _table([1, 1, 0, 0]),
        ("+ third", 1): _table([1, 1, 1, 1]),
    }
    first, second, third = compare_rungs([PLAIN, SECOND, THIRD], tables, SCORE, 200)
    assert first["metrics"] == {"accuracy": {"mean": 0.375, "std": pytest.approx(np.std([0.25, 0.5], ddof=1))}}
    difference = second["to_rung_before"]
    assert difference["rung"] == "plain"
    assert difference["metrics"]["accuracy"]["value"] == pytest.approx((0.5 + 0.0) / 2)
    assert difference["metrics"]["accuracy"]["std_over_seeds"] == pytest.approx(np.std([0.5, 0.0], ddof=1))
    assert third["to_rung_before"]["seeds"] == [1], "the only seed that both have"
    assert third["to_rung_before"]["metrics"]["accuracy"]["value"] == pytest.approx(0.5)
    assert third["to_first_rung"] == {**third["to_first_rung"], "rung": "plain", "seeds": [1]}
    assert "unshown" not in first["metrics"]


def test_a_metric_that_is_not_defined_is_none() -> None:
    def measure(table: pa.Table) -> Callable[[np.ndarray], dict[str, float]]:
        return lambda weights: {"accuracy": float("nan")}

    undefined = Score("accuracy", measure, ("accuracy",), headline=("accuracy",), compared=("accuracy",))
    tables = {("plain", seed): _table([1, 0]) for seed in (0, 1)} | {("+ second", 0): _table([1, 1])}
    entries = compare_rungs([PLAIN, SECOND], tables, undefined, 10)
    assert entries[0]["metrics"]["accuracy"] == {"mean": None, "std": None}
    assert entries[1]["to_rung_before"]["metrics"]["accuracy"]["value"] is None
    assert verdicts(entries, undefined) == []


def test_a_rung_without_results_is_left_out_and_the_next_is_held_against_the_one_before_it() -> None:
    tables = {("plain", 0): _table([1, 0]), ("+ third", 0): _table([1, 1])}
    entries = compare_rungs([PLAIN, SECOND, THIRD], tables, SCORE, 100)
    assert [entry["rung"] for entry in entries] == ["plain", "+ third"]
    assert entries[1]["to_rung_before"]["rung"] == "plain"
    assert compare_rungs([PLAIN], {}, SCORE, 100) == []


def test_the_paired_interval_covers_the_true_difference_about_as_often_as_it_says() -> None:
    generator, covered, rounds = np.random.default_rng(0), 0, 120
    for _ in range(rounds):
        plain = generator.random(300) < 0.6
        better = plain | (generator.random(300) < 0.25)  # gains .25 of the .4 that were wrong: .1
        tables = {("plain", 0): _table(list(plain)), ("+ second", 0): _table(list(better))}
        value = compare_rungs([PLAIN, SECOND], tables, SCORE, 200)[1]["to_rung_before"]["metrics"]["accuracy"]
        covered += value["low"] <= 0.1 <= value["high"]
    assert 0.88 <= covered / rounds <= 0.995


def test_the_sentence_says_whether_a_component_helps() -> None:
    many = {
        ("plain", 0): _table([1, 0] * 100),
        ("+ second", 0): _table([1, 1] * 100),
        ("+ third", 0): _table([1, 0] * 100),
    }
    entries = compare_rungs([PLAIN, SECOND, THIRD], many, SCORE, 100)
    helps, harms = verdicts(entries, SCORE)
    assert helps.startswith("+ second helps: accuracy +0.5000 [")
    assert helps.endswith("to plain, 1 seed.")
    assert harms.startswith("+ third HARMS: accuracy -0.5000")
    same = {**many, ("+ second", 0): many["plain", 0]}
    assert "is not shown to help" in verdicts(compare_rungs([PLAIN, SECOND], same, SCORE, 100), SCORE)[0]


def test_other_test_rows_have_no_difference() -> None:
    with pytest.raises(ConfigError, match="tested on other rows"):
        compare_rungs([PLAIN, SECOND], {("plain", 0): _table([1]), ("+ second", 0): _table([1, 1])}, SCORE, 10)


def test_rows_of_one_unit_are_drawn_together() -> None:
    parts = Score("accuracy", _measure, ("accuracy",), unit="part")
    table = _table([1, 1, 0, 0, 0], part=["b", "a", "b", "c", "a"])
    drawn = list(parts.draws(table, 50))
    for weights in drawn:
        assert weights[0] == weights[2]
        assert weights[1] == weights[4]
        assert weights[[0, 1, 3]].sum() == 3
    assert any(weights[3] > 1 for weights in drawn)
    assert next(parts.draws(_table([1, 0]), 5)).sum() == 2, "a table that does not name them has rows alone"


def test_a_seed_that_is_given_is_the_first_of_the_study(tmp_path: Path) -> None:
    settings = [f"output_dir={tmp_path}", "seed=5"]
    study = Study("ticket_routing/demo", settings, 2)
    assert sorted({cell.seed for cell in study.cells}) == [5, 6]
    assert study.cells[0].name.endswith("-s5")
    assert study.members[-1].settings[-1] == "seed=6"
    assert Study("ticket_routing/demo", settings[:1], 1).cells[0].seed == 0
