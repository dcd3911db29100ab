"""The metrics of a quality engineer, against values computed by hand and by scikit-learn."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from scipy.stats import binom
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

from recipes.defect_detection import score as scored
from recipes.defect_detection.measures import recall_at_least
from recipes.defect_detection.predictions import BINARY, Header, make_table
from tests.part_predictions import make_predictions

DECISION = {"temperature": 1.0, "flag_from": 0.5, "accept_below": 0.2, "reject_from": 0.7}
SCORE = np.array([0.1, 0.3, 0.6, 0.9, 0.15, 0.65, 0.8, 0.05])
DEFECTIVE = np.array([False, False, False, False, True, True, True, False])


def _values(table: pa.Table, weights: np.ndarray | None = None) -> dict[str, float]:
    return scored.measure(table)(np.ones(table.num_rows) if weights is None else weights)


def test_areas_and_f1_are_those_of_scikit_learn() -> None:
    generator = np.random.default_rng(0)
    score, defective = generator.random(500).round(2), generator.random(500) < 0.1
    values = _values(scored.decide(make_predictions(score, defective), DECISION))
    assert values["pr_auc"] == pytest.approx(average_precision_score(defective, score))
    assert values["roc_auc"] == pytest.approx(roc_auc_score(defective, score))
    assert values["f1"] == pytest.approx(f1_score(defective, score >= 0.5))


def test_a_row_that_is_drawn_twice_counts_as_two_rows() -> None:
    weights = np.array([2, 1, 0, 1, 3, 1, 1, 1], dtype=float)
    again = np.repeat(np.arange(8), weights.astype(int))
    drawn = _values(scored.decide(make_predictions(SCORE, DEFECTIVE), DECISION), weights)
    written_out = _values(scored.decide(make_predictions(SCORE[again], DEFECTIVE[again]), DECISION))
    assert drawn == pytest.approx(written_out)


def test_recall_at_few_false_rejects_is_read_off_the_ranking() -> None:
    good = np.linspace(0.0, 0.99, 1000)
    defective = np.array([0.995, 0.985, 0.975, 0.5])
    score = np.concatenate([good, defective])
    table = make_predictions(score, np.arange(1004) >= 1000)
    values = _values(table)
    # 0.995 lies above every good part; 5 good parts lie above 0.985, 15 above 0.975.
    assert values["recall_at_1_per_1000"] == 0.25
    assert values["recall_at_10_per_1000"] == 0.5
    assert values["recall_at_50_per_1000"] == 0.75


def test_escapes_overkill_and_reviews_are_counted_by_the_decisions() -> None:
    values = _values(scored.decide(make_predictions(SCORE, DEFECTIVE), DECISION))
    assert values["caught"] == pytest.approx(2 / 3), "0.15 is accepted, 0.65 reviewed, 0.8 rejected"
    assert values["overkill"] == pytest.approx(1 / 5), "0.9"
    assert values["review_share"] == pytest.approx(3 / 8), "0.3, 0.6 and 0.65"
    assert 0 < values["caught_at_least"] < values["caught"]


def test_the_lower_bound_of_recall_is_the_exact_one() -> None:
    assert recall_at_least(0, 10) == 0.0
    assert recall_at_least(10, 10) == pytest.approx(0.05 ** (1 / 10))
    bound = recall_at_least(37, 40)
    assert binom.sf(36, 40, bound) == pytest.approx(0.05)


def test_more_images_of_the_same_parts_make_nobody_surer_of_what_is_caught() -> None:
    items = [str(index) for index in range(8)]
    alone = _values(scored.decide(make_predictions(SCORE, DEFECTIVE, item=items), DECISION))
    six_each = make_predictions(np.repeat(SCORE, 6), np.repeat(DEFECTIVE, 6), item=np.repeat(items, 6))
    often = _values(scored.decide(six_each, DECISION))
    assert often["caught_at_least"] == pytest.approx(alone["caught_at_least"])


def test_recall_is_told_by_kind_and_size_of_defect() -> None:
    kinds = ["", "", "", "", "crack", "crack", "hole", ""]
    area = np.array([-1, -1, -1, -1, 10, 200, 5000, -1])
    table = make_predictions(SCORE, DEFECTIVE, type=kinds, defect_px=area)
    values = _values(scored.decide(table, DECISION))
    assert (values["type/crack/rows"], values["type/crack/recall"]) == (2, 0.5)
    assert (values["type/hole/rows"], values["type/hole/recall"]) == (1, 1.0)
    assert values["size/1 to 31 px/recall"] == 0.0
    assert values["size/128 to 511 px/recall"] == values["size/512 px and more/recall"] == 1.0
    assert "size/32 to 127 px/rows" not in values


def test_heat_map_hits_stand_beside_the_middle_and_a_random_point() -> None:
    mask = np.zeros((10, 20), dtype=np.uint8)
    mask[0:2, 0:10] = 1
    peaks = np.array([[0.15, 0.2], [0.25, 0.52], [0.05, 0.05]])
    rows = make_predictions(np.array([0.9, 0.8, 0.1]), np.ones(3, dtype=bool)).drop_columns(["probability"])
    outputs = {"probability": np.array([[0.1, 0.9], [0.2, 0.8], [0.9, 0.1]]), "peak": peaks}
    outputs["heat"] = np.zeros((3, 5, 5))
    table = make_table(rows, outputs, Header(BINARY, 0, True), [mask, mask, mask])
    values = _values(scored.decide(table, DECISION))
    assert values["peak_in_mask"] == 0.5, "the third one is not found, and so has no part in it"
    assert values["centre_in_mask"] == 0.0
    assert values["random_point_in_mask"] == pytest.approx(0.1)
    near = [values[f"{point}_near_mask"] for point in ("peak", "centre", "random_point")]
    assert near == pytest.approx([1.0, 0.0, 3 * 11 / 200]), "one pixel aside of 20"


def test_a_split_without_defective_parts_has_no_recall_and_says_so() -> None:
    table = scored.decide(make_predictions(np.array([0.1, 0.8]), np.zeros(2, dtype=bool)), DECISION)
    values = _values(table)
    assert np.isnan(values["pr_auc"])
    assert np.isnan(values["caught"])
    assert np.isnan(values["recall_at_10_per_1000"])
    assert values["overkill"] == 0.5
    entries = {name: {"value": None if np.isnan(value) else value} for name, value in values.items()}
    assert scored.remarks(entries) == ["50.0% of the good parts are rejected; 0.0% of all go to an operator."]


def test_several_classes_have_the_metrics_of_classification() -> None:
    rows = make_predictions(SCORE, DEFECTIVE).drop_columns(["probability"])
    probability = np.stack([SCORE, 1 - SCORE, np.zeros(8)], 1)
    table = make_table(rows, {"probability": probability}, Header(["a", "b", "c"], None, False))
    values = _values(scored.decide(table, {"temperature": 1.0, "sure_from": 0.8}))
    assert {"macro_f1", "pr_auc", "class/a/f1", "review_share", "accuracy_without_review"} <= set(values)
    assert "f1" not in values
