"""Values, intervals and paired differences of several models on the same rows."""

from __future__ import annotations

import numpy as np

from dist_train.metrics import Classification
from dist_train.report import measure_models


def _model(truth: np.ndarray, seed: int, skill: float) -> Classification:
    generator = np.random.default_rng(seed)
    score = generator.normal(size=(len(truth), 3))
    score[np.arange(len(truth)), truth] += skill
    probability = np.exp(score) / np.exp(score).sum(1, keepdims=True)
    return Classification(truth, probability.argmax(1), probability, ["a", "b", "c"])


def test_two_models_of_equal_predictions_differ_by_exactly_nothing() -> None:
    truth = np.random.default_rng(0).integers(0, 3, 300)
    measured = measure_models({"model": _model(truth, 1, 1.0), "ngram": _model(truth, 1, 1.0)}, 200, ("accuracy",))
    assert measured["comparison"]["ngram"]["accuracy"] == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_a_paired_difference_is_narrower_than_the_intervals_it_comes_from() -> None:
    truth = np.random.default_rng(0).integers(0, 3, 2000)
    weak = _model(truth, 1, 1.0)
    strong = _model(truth, 1, 1.3)
    measured = measure_models({"model": strong, "ngram": weak}, 300, ("macro_f1",))
    entry = measured["comparison"]["ngram"]["macro_f1"]
    assert entry["low"] > 0
    alone = measured["metrics"]["model"]["macro_f1"]
    assert entry["high"] - entry["low"] < 0.8 * (alone["high"] - alone["low"])


def test_every_class_has_its_own_interval_and_row_count() -> None:
    truth = np.random.default_rng(0).integers(0, 3, 300)
    measured = measure_models({"model": _model(truth, 1, 1.0)}, 100, ())
    classes = measured["classes"]["model"]
    assert sum(entry["support"] for entry in classes.values()) == 300
    for entry in classes.values():
        assert entry["f1"]["low"] <= entry["f1"]["value"] <= entry["f1"]["high"]
