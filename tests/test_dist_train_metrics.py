"""Metrics agree with scikit-learn, under weights too, and intervals cover what they should."""

from __future__ import annotations

import numpy as np
import pytest
import sklearn.metrics as reference
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_train.metrics import Classification, bootstrap_weights, interval


def _case(seed: int, rows: int, classes: int, digits: int = 2) -> tuple[Classification, np.ndarray, np.ndarray]:
    """Probabilities rounded so that ties are common."""
    generator = np.random.default_rng(seed)
    truth = generator.integers(0, classes, rows)
    score = generator.normal(size=(rows, classes))
    score[np.arange(rows), truth] += 1.0
    probability = np.round(np.exp(score) / np.exp(score).sum(1, keepdims=True), digits) + 1e-3
    probability /= probability.sum(1, keepdims=True)
    labels = [f"q{index}" for index in range(classes)]
    return Classification(truth, probability.argmax(1), probability, labels), truth, probability


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), rows=st.integers(20, 200), classes=st.integers(2, 5), weighted=st.booleans())
def test_every_metric_equals_that_of_scikit_learn(seed: int, rows: int, classes: int, weighted: bool) -> None:
    model, truth, probability = _case(seed, rows, classes)
    weights = next(bootstrap_weights(rows, 1, seed)) if weighted else np.ones(rows)
    if len(np.unique(truth[weights > 0])) < classes:
        return
    values, predicted = model.values(weights), probability.argmax(1)
    options = {"labels": range(classes), "zero_division": 0, "sample_weight": weights}
    assert values["accuracy"] == pytest.approx(reference.accuracy_score(truth, predicted, sample_weight=weights))
    for kind in ("macro", "weighted"):
        expected = reference.precision_recall_fscore_support(truth, predicted, average=kind, **options)[:3]
        assert [values[f"{kind}_{name}"] for name in ("precision", "recall", "f1")] == pytest.approx(expected)
    per_class = reference.f1_score(truth, predicted, average=None, **options)
    assert [values[f"class/q{index}/f1"] for index in range(classes)] == pytest.approx(per_class)
    loss = reference.log_loss(truth, probability, labels=range(classes), sample_weight=weights)
    assert values["log_loss"] == pytest.approx(loss)
    binary = np.eye(classes)[truth]
    areas = [reference.roc_auc_score(binary[:, c], probability[:, c], sample_weight=weights) for c in range(classes)]
    assert values["roc_auc"] == pytest.approx(np.mean(areas))
    precision = reference.average_precision_score(binary, probability, sample_weight=weights)
    assert values["pr_auc"] == pytest.approx(precision)


def test_weights_count_rows_as_often_as_copies_do() -> None:
    model, truth, probability = _case(1, 60, 3)
    weights = next(bootstrap_weights(60, 1, 5))
    copies = np.repeat(np.arange(60), weights.astype(int))
    again = Classification(truth[copies], probability[copies].argmax(1), probability[copies], model.labels)
    assert model.values(weights) == pytest.approx(again.values())


def test_calibration_error_is_the_gap_between_confidence_and_accuracy() -> None:
    probability = np.tile([0.9, 0.1], (10, 1))
    truth = np.array([0] * 6 + [1] * 4)
    model = Classification(truth, np.zeros(10, dtype=int), probability, ["a", "b"])
    assert model.values()["calibration_error"] == pytest.approx(0.3)
    assert model.reliability() == [pytest.approx({"confidence": 0.9, "accuracy": 0.6, "rows": 10.0})]


def test_a_metric_that_is_not_defined_is_null_and_never_a_number() -> None:
    model = Classification(np.zeros(4, dtype=int), np.zeros(4, dtype=int), np.tile([0.8, 0.2], (4, 1)), ["a", "b"])
    assert np.isnan(model.values()["roc_auc"])
    assert interval(model.values()["roc_auc"], np.full(9, np.nan)) == {"value": None, "low": None, "high": None}


def test_a_class_without_rows_has_no_metrics_and_no_part_in_the_macro_means() -> None:
    _, truth, probability = _case(3, 80, 3)
    wider = np.insert(probability, 1, 0.001, axis=1)
    with_gap = Classification(np.where(truth > 0, truth + 1, 0), wider.argmax(1), wider, ["q0", "gap", "q1", "q2"])
    values = with_gap.values()
    assert np.isnan([values[f"class/gap/{name}"] for name in ("precision", "recall", "f1")]).all()
    known = [values[f"class/q{index}/f1"] for index in range(3)]
    assert values["macro_f1"] == pytest.approx(np.mean(known))
    assert all(np.isfinite(value) for name, value in values.items() if "/gap/" not in name)


def test_the_interval_of_an_accuracy_covers_the_truth_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        correct = generator.random(150) < 0.8
        draws = np.array([weights @ correct / 150 for weights in bootstrap_weights(150, 200, trial)])
        entry = interval(float(correct.mean()), draws)
        assert entry["low"] is not None
        assert entry["high"] is not None
        covered += entry["low"] <= 0.8 <= entry["high"]
    assert 0.90 <= covered / 200 <= 0.99
