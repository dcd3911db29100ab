"""The metrics of good-or-defective predictions under row weights: what a quality engineer asks of them. Torch-free."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from scipy.stats import beta

from dist_train.metrics import Classification, areas, ranking
from recipes.defect_detection.decisions import ACCEPT, REJECT, REVIEW
from recipes.defect_detection.predictions import DEFECTIVE, HITS, probabilities

FALSE_REJECTS_PER_1000 = (1, 10, 50)
SIZES_PX = (32, 128, 512)
"""Bounds of the groups of defects by the pixels of their mask in the prepared image."""
CONFIDENCE = 0.95

Values = Callable[[np.ndarray], dict[str, float]]


def measure_defects(table: pa.Table) -> Values:
    """Of calibrated and decided predictions all metrics; before that those that need no decision, F1 at one half."""
    score = probabilities(table)[:, DEFECTIVE]
    defective = table["label"].to_numpy() == DEFECTIVE
    decided = "decision" in table.column_names
    flagged = table["predicted"].to_numpy() == DEFECTIVE if decided else score >= 0.5
    ranked = ranking(score, defective)
    calibration = Classification(
        defective.astype(np.int64),
        (score >= 0.5).astype(np.int64),
        np.stack([1 - score, score], 1),
        ["good", "defective"],
    )
    parts: list[Values] = [
        lambda weights: _curve(ranked, weights),
        lambda weights: _flags(flagged, defective, weights),
        lambda weights: _named(calibration.values(weights), ("log_loss", "calibration_error")),
    ]
    if decided:
        parts.append(_decisions(table, defective))
        parts.append(_groups(table, flagged, defective))
    if decided and HITS[0] in table.column_names:
        parts.append(_hits(table, flagged & defective))

    def values(weights: np.ndarray) -> dict[str, float]:
        return {name: value for part in parts for name, value in part(weights).items()}

    return values


def recall_name(false_rejects: int) -> str:
    return f"recall_at_{false_rejects}_per_1000"


def recall_at_least(caught: float, of: float) -> float:
    """One-sided 95 % lower bound of the share of defective parts that is caught (Clopper and Pearson 1934)."""
    return float(beta.ppf(1 - CONFIDENCE, caught, of - caught + 1)) if caught > 0 else 0.0


def _curve(ranked: tuple[np.ndarray, np.ndarray, np.ndarray], weights: np.ndarray) -> dict[str, float]:
    """Areas, and the share of defective parts found while at most so many of 1,000 good ones are rejected."""
    roc, average_precision = areas(ranked, weights)
    order, positive, ends = ranked
    drawn = weights[order]
    hits, misses = (np.cumsum(drawn * side)[ends] for side in (positive, 1 - positive))
    values = {"pr_auc": average_precision, "roc_auc": roc}
    for count in FALSE_REJECTS_PER_1000:
        within = misses <= count / 1000 * misses[-1]
        values[recall_name(count)] = _share(hits[within].max(initial=0.0), hits[-1]) if misses[-1] else np.nan
    return values


def _flags(flagged: np.ndarray, defective: np.ndarray, weights: np.ndarray) -> dict[str, float]:
    hits, given, there = weights @ (flagged & defective), weights @ flagged, weights @ defective
    return {
        "f1": _share(2 * hits, given + there),
        "precision": _share(hits, given),
        "recall": _share(hits, there),
        "accuracy": _share(weights @ (flagged == defective), weights.sum()),
    }


def _decisions(table: pa.Table, defective: np.ndarray) -> Values:
    decision = np.array(table["decision"].to_pylist())
    accepted, rejected, reviewed = (decision == word for word in (ACCEPT, REJECT, REVIEW))
    # Images of one part are caught or missed together: the bound counts parts, an image being a share of its part.
    _, part = np.unique(np.array(table["item"].to_pylist()), return_inverse=True)
    of_a_part = defective / np.maximum(np.bincount(part, defective), 1)[part]

    def values(weights: np.ndarray) -> dict[str, float]:
        parts = float(weights @ of_a_part)
        return {
            "caught": _share(weights @ (defective & ~accepted), weights @ defective),
            "caught_at_least": recall_at_least(float(weights @ (of_a_part * ~accepted)), parts) if parts else np.nan,
            "overkill": _share(weights @ (rejected & ~defective), weights @ ~defective),
            "review_share": _share(weights @ reviewed, weights.sum()),
        }

    return values


def _groups(table: pa.Table, flagged: np.ndarray, defective: np.ndarray) -> Values:
    """Rows and recall by the kind of defect, and by its size where there are masks."""
    kinds = np.array(table["type"].to_pylist(), dtype=object)
    members = {f"type/{name}": kinds == name for name in sorted(set(kinds[defective].tolist()))}
    area = table["defect_px"].to_numpy()
    bounds = (1, *SIZES_PX, np.inf)
    for low, high in itertools.pairwise(bounds):
        name = f"{SIZES_PX[-1]} px and more" if high == np.inf else f"{low} to {int(high) - 1} px"
        members[f"size/{name}"] = (area >= low) & (area < high)
    members = {name: member & defective for name, member in members.items() if (member & defective).any()}

    def values(weights: np.ndarray) -> dict[str, float]:
        result: dict[str, float] = {}
        for name, member in members.items():
            own = weights @ member
            result |= {f"{name}/rows": own, f"{name}/recall": _share(weights @ (member & flagged), own)}
        return result

    return values


def _hits(table: pa.Table, found: np.ndarray) -> Values:
    """Of the defective parts that are flagged and have a mask: how often the heat map's peak, the image's middle and a
    random point lie in it, and near it."""
    points = {name: table[name].to_numpy(zero_copy_only=False).astype(np.float64) for name in HITS}
    found = found & np.isfinite(points[HITS[0]])
    hit = {name: np.where(found, values, 0.0) for name, values in points.items()}

    def values(weights: np.ndarray) -> dict[str, float]:
        of = weights @ found
        return {name: _share(weights @ each, of) for name, each in hit.items()}

    return values


def _named(values: Mapping[str, float], names: tuple[str, ...]) -> dict[str, float]:
    return {name: values[name] for name in names}


def _share(part: Any, whole: Any) -> float:
    return float(part / whole) if whole > 0 else np.nan
