"""What becomes of a part: temperature and thresholds from the validation split, and what they decide. Torch-free.

Good or defective: a part is accepted, rejected, or reviewed by an operator, wherever that costs least on the validation
split. Of several classes the likeliest is taken, and a part in doubt is reviewed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from dist_train.calibration import fit_temperature, sharpen
from dist_train.metrics import bootstrap_weights
from recipes.defect_detection import one_class
from recipes.defect_detection.config import Config, TaskConfig
from recipes.defect_detection.predictions import (
    DEFECTIVE,
    header_of,
    lists_of,
    probabilities,
    with_probabilities,
)

ACCEPT, REVIEW, REJECT = "accept", "review", "reject"
# A threshold is the median of those that suit so many bootstrap samples best: a single best one of few hundred images
# jumps with each of them.
_THRESHOLD_SAMPLES = 200
_SEED = 20_240_229
# A few images that are all told apart ask for no end of sharpness, which would make scores equal that are not.
_LEAST_TEMPERATURE = 0.5


def calibrate(validation: pa.Table, config: Config) -> dict[str, Any]:
    """Temperature and thresholds, as `decide` and `decision_of` read them."""
    header, task = header_of(validation), config.task
    if header.one_class:
        return one_class.calibrate(lists_of(validation, "feature"), validation["label"].to_numpy() == header.good)
    probability, truth = probabilities(validation), validation["label"].to_numpy()
    temperature = fit_temperature(probability, truth, least=_LEAST_TEMPERATURE)
    sharp = sharpen(probability, temperature)
    if not header.is_binary:
        return {"temperature": temperature, "sure_from": 1 - task.cost_review / task.cost_overkill}
    return {"temperature": temperature, **_thresholds(sharp[:, DEFECTIVE], truth == DEFECTIVE, task)}


def decide(table: pa.Table, decision: Mapping[str, Any]) -> pa.Table:
    """Predictions with calibrated probabilities and what becomes of each part; for good or defective also whether it is
    flagged by the threshold that suits F1 best."""
    features = lists_of(table, "feature") if "feature" in table.column_names else None
    probability = calibrated(probabilities(table), features, decision)
    table = with_probabilities(table, probability)
    table = table.append_column("predicted", pa.array(predicted(probability, decision).astype(np.int32)))
    return table.append_column("decision", pa.array(decisions_of(probability, decision)))


def calibrated(probability: np.ndarray, features: np.ndarray | None, decision: Mapping[str, Any]) -> np.ndarray:
    """Probabilities [n, labels] under the decision's temperature; in one-class mode from the features [n, d]."""
    if "gaussian" in decision:
        assert features is not None
        return one_class.probability(features, decision["gaussian"])
    return sharpen(probability, decision["temperature"])


def predicted(probability: np.ndarray, decision: Mapping[str, Any]) -> np.ndarray:
    """The label of each row [n] of calibrated probabilities: the likeliest, or defective from the threshold on that
    suits F1 best."""
    if "flag_from" in decision:
        return np.where(probability[:, DEFECTIVE] >= decision["flag_from"], DEFECTIVE, 1 - DEFECTIVE)
    return probability.argmax(1)


def as_deployed(defective: np.ndarray, decision: Mapping[str, Any]) -> np.ndarray:
    """Calibrated probabilities of a defect [n], corrected from the share of defective parts in the data to that where
    the model is used (Saerens et al. 2002). Thresholds are of the former; the order is the same."""
    if "deployed_share" not in decision or not 0 < decision["data_share"] < 1:
        return defective
    odds = [decision[name] / (1 - decision[name]) for name in ("deployed_share", "data_share")]
    ratio = odds[0] / odds[1]
    return defective * ratio / (defective * ratio + 1 - defective)


def decisions_of(probability: np.ndarray, decision: Mapping[str, Any]) -> list[str]:
    """ACCEPT, REVIEW or REJECT of each row of calibrated probabilities; with several classes ACCEPT or REVIEW of the
    predicted class."""
    if "sure_from" in decision:
        return [ACCEPT if sure else REVIEW for sure in probability.max(1) >= decision["sure_from"]]
    defective = probability[:, DEFECTIVE]
    accepted, rejected = defective < decision["accept_below"], defective >= decision["reject_from"]
    return [ACCEPT if a else REJECT if r else REVIEW for a, r in zip(accepted, rejected, strict=True)]


def _thresholds(score: np.ndarray, defective: np.ndarray, task: TaskConfig) -> dict[str, Any]:
    """flag_from suits F1 best; accept_below and reject_from cost least, each part weighed as it will be deployed."""
    if not defective.any():
        # Nothing to choose by: a part is defective where that is likelier than not.
        nothing = {"deployed_share": task.deployed_share or 0.0, "data_share": 0.0}
        return {"flag_from": 0.5, "accept_below": 0.5, "reject_from": 0.5, **nothing}
    order = np.argsort(score, kind="stable")
    ranked, is_defective = score[order], defective[order]
    share = float(defective.mean())
    deployed = task.deployed_share or share
    weight = np.where(is_defective, deployed / max(share, 1e-9), (1 - deployed) / max(1 - share, 1e-9))
    escape, overkill = weight * is_defective * task.cost_escape, weight * ~is_defective * task.cost_overkill
    review = weight * task.cost_review

    def f1(drawn: np.ndarray) -> np.ndarray:
        hits, flagged = _from_cut(drawn * is_defective), _from_cut(drawn)
        return 2 * hits / np.maximum(flagged + hits[0], 1)

    # The cost of all parts is that of reviewing them, and what accepting and rejecting some adds to it or saves.
    accept_below = _best_threshold(ranked, lambda drawn: -_below_cut(drawn * (escape - review)))
    reject_from = _best_threshold(ranked, lambda drawn: -_from_cut(drawn * (overkill - review)))
    if accept_below > reject_from:  # a review costs more than it can save
        accept_below = reject_from = _best_threshold(
            ranked, lambda drawn: -_below_cut(drawn * escape) - _from_cut(drawn * overkill)
        )
    return {
        "flag_from": _best_threshold(ranked, f1),
        "accept_below": accept_below,
        "reject_from": reject_from,
        "deployed_share": deployed,
        "data_share": share,
        "costs": {"escape": task.cost_escape, "overkill": task.cost_overkill, "review": task.cost_review},
    }


def _best_threshold(ranked: np.ndarray, quality: Callable[[np.ndarray], np.ndarray]) -> float:
    """The median over bootstrap samples of the threshold of the highest quality. ranked [n]: scores, rising. quality:
    from how often each row is drawn [n] to the quality of each cut [n + 1]: so many rows lie below it."""
    # Rows of one score are never parted. Beyond the last one lies a cut above every probability.
    places = np.append(np.flatnonzero(np.append(True, np.diff(ranked) > 0)), len(ranked))
    middles = np.concatenate([[0.0], (ranked[places[1:-1] - 1] + ranked[places[1:-1]]) / 2, [np.nextafter(1.0, 2.0)]])
    draws = bootstrap_weights(len(ranked), _THRESHOLD_SAMPLES, _SEED)
    return float(np.median([middles[np.nanargmax(quality(drawn)[places])] for drawn in draws]))


def _below_cut(values: np.ndarray) -> np.ndarray:
    """[n + 1]: the sum of the values below each cut."""
    return np.concatenate([[0.0], np.cumsum(values)])


def _from_cut(values: np.ndarray) -> np.ndarray:
    """[n + 1]: the sum of the values above each cut."""
    below = _below_cut(values)
    return below[-1] - below
