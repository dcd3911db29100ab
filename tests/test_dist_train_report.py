"""Values, intervals and paired differences of several models on the same rows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow as pa

from dist_train.metrics import Classification
from dist_train.report import _gain, _verdicts, best_baseline, measure_models
from dist_train.score import Score, by_group

LABELS = ["a", "b", "c"]


def _measure(table: pa.Table) -> Callable[[np.ndarray], dict[str, float]]:
    probability = np.array(table["probability"].to_pylist())
    return Classification(table["label"].to_numpy(), probability.argmax(1), probability, LABELS).values


def _score(*compared: str) -> Score:
    return Score("accuracy", _measure, ("accuracy",), compared=compared, about_baselines={"ngram": "words"})


def _predictions(truth: np.ndarray, seed: int, skill: float) -> pa.Table:
    score = np.random.default_rng(seed).normal(size=(len(truth), 3))
    score[np.arange(len(truth)), truth] += skill
    probability = np.exp(score) / np.exp(score).sum(1, keepdims=True)
    return pa.table({"label": truth, "probability": list(probability)})


def test_two_models_of_equal_predictions_differ_by_exactly_nothing() -> None:
    truth = np.random.default_rng(0).integers(0, 3, 300)
    same = {"model": _predictions(truth, 1, 1.0), "ngram": _predictions(truth, 1, 1.0)}
    measured = measure_models(same, _score("accuracy"), 200)
    assert measured["comparison"]["ngram"]["accuracy"] == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_a_paired_difference_is_narrower_than_the_intervals_it_comes_from() -> None:
    truth = np.random.default_rng(0).integers(0, 3, 2000)
    weak, strong = _predictions(truth, 1, 1.0), _predictions(truth, 1, 1.3)
    measured = measure_models({"model": strong, "ngram": weak}, _score("macro_f1"), 300)
    entry = measured["comparison"]["ngram"]["macro_f1"]
    assert entry["low"] > 0
    alone = measured["metrics"]["model"]["macro_f1"]
    assert entry["high"] - entry["low"] < 0.8 * (alone["high"] - alone["low"])


def test_every_class_has_its_own_interval_and_row_count() -> None:
    truth = np.random.default_rng(0).integers(0, 3, 300)
    measured = measure_models({"model": _predictions(truth, 1, 1.0)}, _score(), 100)
    classes = measured["groups"]["model"]["class"]
    assert sum(entry["rows"] for entry in classes.values()) == 300
    for entry in classes.values():
        assert entry["f1"]["low"] <= entry["f1"]["value"] <= entry["f1"]["high"]


def test_a_lower_error_beats_where_lower_is_better() -> None:
    entry = {"value": -0.2, "low": -0.3, "high": -0.1}
    metrics = {"model": {"mae": {"value": 0.5}}, "ngram": {"mae": {"value": 0.7}}}
    measured = {"comparison": {"ngram": {"mae": entry}}, "metrics": metrics}
    score = Score("mae", _measure, ("mae",), about_baselines={"ngram": "words"})
    assert "is WORSE than" in _verdicts(measured, score)[0]
    lower = Score("mae", _measure, ("mae",), frozenset({"mae"}), about_baselines={"ngram": "words"})
    assert "beats" in _verdicts(measured, lower)[0]


def test_the_name_of_a_group_may_hold_slashes() -> None:
    assert by_group({"accuracy": 1, "class/a/b/f1": 2}) == {"class": {"a/b": {"f1": 2}}}


def test_the_gain_is_over_the_baseline_that_is_best_on_validation_whatever_the_test_says() -> None:
    def entries(weak: float, strong: float) -> dict[str, dict[str, dict[str, float]]]:
        return {
            "model": {"mae": {"value": 0.4}},
            "weak": {"mae": {"value": weak}},
            "strong": {"mae": {"value": strong}},
        }

    difference = {"mae": {"value": -0.2, "low": -0.3, "high": -0.1}}
    measured = {
        "validation": {"metrics": entries(weak=0.9, strong=0.6)},
        "test": {"metrics": entries(weak=0.5, strong=0.6), "comparison": {"weak": {}, "strong": difference}},
    }
    score = Score("mae", _measure, ("mae",), frozenset({"mae"}))
    assert best_baseline(measured["validation"]["metrics"], score) == "strong"
    (sentence,) = _gain(measured, score)
    assert "validation split, strong, the model beats it" in sentence
    assert "mae -0.2000 [-0.3000, -0.1000]" in sentence
    alone = {**measured, "test": {"metrics": {}, "comparison": {"strong": difference}}}
    assert _gain(alone, score) == [], "one baseline has its own sentence already"
