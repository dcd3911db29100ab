"""Thresholds come from the validation split and cost least there; the one-class mode needs good parts alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from dist_train.calibration import sharpen
from recipes.defect_detection import one_class
from recipes.defect_detection.config import Config
from recipes.defect_detection.decisions import (
    as_deployed,
    calibrate,
    decide,
    decisions_of,
    predicted,
)
from recipes.defect_detection.predictions import Header, make_table, probabilities
from tests.part_predictions import make_predictions


def _calibrated_parts(count: int = 4000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Scores that are the true probabilities of a defect."""
    generator = np.random.default_rng(seed)
    score = generator.beta(0.4, 2.0, count)
    return score, generator.random(count) < score


def _config(**task: float) -> Config:
    return Config(recipe="defect_detection", task=task)  # type: ignore[arg-type]


def test_the_temperature_undoes_what_made_the_model_too_sure() -> None:
    score, defective = _calibrated_parts()
    too_sure = sharpen(np.stack([1 - score, score], 1), 0.5)[:, 1]
    decision = calibrate(make_predictions(too_sure, defective), _config())
    assert decision["temperature"] == pytest.approx(2.0, rel=0.1)
    mended = probabilities(decide(make_predictions(too_sure, defective), decision))[:, 1]
    np.testing.assert_allclose(mended, score, atol=0.05)


def test_parts_are_accepted_reviewed_and_rejected_where_that_costs_least() -> None:
    score, defective = _calibrated_parts(40_000)
    decision = calibrate(make_predictions(score, defective), _config(cost_escape=10, cost_overkill=1, cost_review=0.3))
    # With true probabilities the cheapest thresholds are known (Chow 1970): 0.3 / 10, and 1 - 0.3 / 1.
    assert decision["accept_below"] == pytest.approx(0.03, abs=0.012)
    assert decision["reject_from"] == pytest.approx(0.7, abs=0.06)
    assert decisions_of(np.array([[0.99, 0.01], [0.6, 0.4], [0.1, 0.9]]), decision) == ["accept", "review", "reject"]


def test_nothing_is_reviewed_where_a_review_costs_more_than_it_saves() -> None:
    score, defective = _calibrated_parts(40_000)
    decision = calibrate(make_predictions(score, defective), _config(cost_escape=4, cost_overkill=1, cost_review=2))
    assert decision["accept_below"] == decision["reject_from"] == pytest.approx(0.2, abs=0.05)  # 1 / (4 + 1)
    decided = decide(make_predictions(score, defective), decision)
    assert set(decided["decision"].to_pylist()) == {"accept", "reject"}


def test_the_f1_threshold_is_as_good_as_the_best_one_on_the_same_parts() -> None:
    score, defective = _calibrated_parts()
    table = make_predictions(score, defective)
    decision = calibrate(table, _config())
    mended = probabilities(decide(table, decision))[:, 1]

    def f1(threshold: float) -> float:
        flagged = mended >= threshold
        return 2 * (flagged & defective).sum() / (flagged.sum() + defective.sum())

    best = max(f1(threshold) for threshold in mended)
    assert f1(decision["flag_from"]) == pytest.approx(best, abs=0.005)
    flagged = predicted(np.stack([1 - mended, mended], 1), decision)
    assert 2 * (flagged & defective).sum() / (flagged.sum() + defective.sum()) == f1(decision["flag_from"])


def test_another_share_of_defects_in_use_moves_thresholds_and_answers() -> None:
    score, defective = _calibrated_parts(40_000)
    usual = calibrate(make_predictions(score, defective), _config(cost_escape=10))
    rare = calibrate(make_predictions(score, defective), _config(cost_escape=10, deployed_share=0.01))
    assert rare["accept_below"] > usual["accept_below"], "where defects are rare more may be accepted"
    answers = as_deployed(np.array([0.5]), rare)
    odds = (0.01 / 0.99) / (defective.mean() / (1 - defective.mean()))
    np.testing.assert_allclose(answers, odds / (1 + odds), rtol=1e-6)
    np.testing.assert_allclose(as_deployed(np.array([0.3]), usual), 0.3)


def test_with_classes_a_part_in_doubt_is_reviewed() -> None:
    header = Header(["a", "b", "c"], None, False)
    probability = np.array([[0.5, 0.3, 0.2], [0.95, 0.03, 0.02]] * 20)
    lines = pa.table(
        {
            "row": np.arange(40),
            "id": [str(index) for index in range(40)],
            "item": [str(index) for index in range(40)],
            "label": np.tile([0, 1, 0, 0], 10).astype(np.int32),
            "type": ["a"] * 40,
            "defect_px": np.full(40, -1),
        }
    )
    table = make_table(lines, {"probability": probability}, header)
    decision = calibrate(table, _config(cost_review=0.2))
    decision["temperature"] = 1.0
    assert decide(table, decision)["decision"].to_pylist()[:2] == ["review", "accept"]
    assert decide(table, decision)["predicted"].to_pylist() == [0] * 40


def test_the_one_class_thresholds_reject_as_many_good_parts_as_stated_and_find_what_is_unlike_them() -> None:
    generator = np.random.default_rng(0)
    mixing = generator.normal(size=(24, 24))
    good = generator.normal(size=(6000, 24)) @ mixing
    decision = one_class.calibrate(good[:3000], np.ones(3000, dtype=bool))
    held_out = one_class.probability(good[3000:], decision["gaussian"])[:, 1]
    assert (held_out >= decision["reject_from"]).mean() == pytest.approx(one_class.REJECTED_SHARE, abs=0.008)
    assert (held_out >= decision["accept_below"]).mean() == pytest.approx(one_class.REVIEWED_SHARE, abs=0.015)
    unlike = generator.normal(size=(500, 24)) @ mixing + 6 * mixing[0]
    assert (one_class.probability(unlike, decision["gaussian"])[:, 1] >= decision["reject_from"]).mean() > 0.5


def test_the_one_class_decision_looks_at_good_parts_alone() -> None:
    generator = np.random.default_rng(1)
    features, good = generator.normal(size=(400, 8)), np.arange(400) < 300
    features[300:] += 100
    assert one_class.calibrate(features, good) == one_class.calibrate(features[:300], np.ones(300, dtype=bool))


def test_a_few_parts_that_are_all_told_apart_do_not_make_scores_equal() -> None:
    generator = np.random.default_rng(0)
    defective = np.arange(60) < 8
    score = np.where(defective, generator.uniform(0.7, 0.99, 60), generator.uniform(0.01, 0.3, 60))
    decided = decide(make_predictions(score, defective), calibrate(make_predictions(score, defective), _config()))
    assert len(np.unique(probabilities(decided)[:, 1])) == 60


def test_without_a_defective_part_to_choose_by_one_half_decides() -> None:
    score = np.linspace(0.01, 0.9, 50)
    decision = calibrate(make_predictions(score, np.zeros(50, dtype=bool)), _config(deployed_share=0.1))
    assert decision["flag_from"] == decision["accept_below"] == decision["reject_from"] == 0.5
    np.testing.assert_array_equal(as_deployed(score, decision), score)


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match=r"their sum must be below 1"):
        Config(recipe="defect_detection", augment={"scratches": 0.6, "paste": 0.5})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"data.item_column is part, but data.item_pattern is '\^\(p\)'"):
        Config(recipe="defect_detection", data={"item_column": "part", "item_pattern": "^(p)"})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"task.mode is one_class, but data.target is classes"):
        Config(recipe="defect_detection", task={"mode": "one_class"}, data={"target": "classes"})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("target", "key", "value"),
    [
        ("classes", "eval.metric", "f1"),
        ("defective", "eval.metric", "macro_f1"),
        ("classes", "augment.scratches", 0.1),
        ("classes", "augment.paste", 0.1),
        ("classes", "task.deployed_share", 0.01),
        ("classes", "task.cost_escape", 5.0),
    ],
)
def test_what_says_nothing_of_the_target_is_refused(target: str, key: str, value: Any) -> None:
    group, name = key.split(".")
    other = {"classes": "defective", "defective": "classes"}[target]
    with pytest.raises(ValueError, match=rf"{key} is {value}, but data.target is {target}.*data.target to {other}"):
        Config(recipe="defect_detection", data={"target": target}, **{group: {name: value}})
    if key != "eval.metric":
        default = type(getattr(Config(recipe="defect_detection"), group)).model_fields[name].default
        Config(recipe="defect_detection", data={"target": target}, **{group: {name: default}})
    Config(recipe="defect_detection", data={"target": other}, **{group: {name: value}})
