"""Metrics of classification and regression under row weights, and bootstrap intervals from them. Torch-free.

A bootstrap sample is a vector that says how often each row was drawn; a metric that takes such weights gives point
value (all ones), interval, and the paired difference of two models (same draws) alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

import numpy as np

CALIBRATION_BINS = 15
# float32 rounds 1 - 1e-8 to 1; a probability nearer to 0 than this is rounding, not conviction.
_LEAST_PROBABILITY = 1e-7


class Classification:
    """Predictions of one split: truth [n] and predicted [n] as class indices, probability [n, classes]."""

    def __init__(self, truth: np.ndarray, predicted: np.ndarray, probability: np.ndarray, labels: list[str]) -> None:
        self.labels = labels
        self.rows = len(truth)
        self._present = np.bincount(truth, minlength=len(labels)) > 0
        self._cell = truth.astype(np.int64) * len(labels) + predicted
        self._rankings = [ranking(probability[:, index], truth == index) for index in range(len(labels))]
        # float32 rows sum to 1 only nearly; rankings are taken before, since a division makes and breaks ties.
        probability = probability.astype(np.float64)
        probability /= probability.sum(1, keepdims=True)
        chosen = probability[np.arange(self.rows), truth]
        self._log_loss = -np.log(np.maximum(chosen, _LEAST_PROBABILITY))
        self._confidence = probability[np.arange(self.rows), predicted]
        self._correct = (truth == predicted).astype(np.float64)
        self._bin = np.minimum((self._confidence * CALIBRATION_BINS).astype(np.int64), CALIBRATION_BINS - 1)

    def values(self, weights: np.ndarray | None = None) -> dict[str, float]:
        """Every metric by name, rows counted `weights` [n] times; a class's own are named class/LABEL/METRIC.

        A class of which the split has no row has no metrics (NaN) and no part in the macro means; of the others
        precision and recall without any row are 0. roc_auc and pr_auc (average precision) are means of one class
        against the rest, over the classes that have rows on both sides.
        """
        weights = np.ones(self.rows) if weights is None else weights
        total = weights.sum()
        confusion = self.confusion(weights)
        hits, support, given = np.diag(confusion), confusion.sum(1), confusion.sum(0)
        precision, recall = _ratio(hits, given), _ratio(hits, support)
        f1 = _ratio(2 * hits, support + given)
        curves = np.array([areas(each, weights) for each in self._rankings])
        both = ~np.isnan(curves[:, 0])
        values = {
            "accuracy": hits.sum() / total,
            "macro_precision": precision[self._present].mean(),
            "macro_recall": recall[self._present].mean(),
            "macro_f1": f1[self._present].mean(),
            "weighted_precision": precision @ support / total,
            "weighted_recall": recall @ support / total,
            "weighted_f1": f1 @ support / total,
            "roc_auc": curves[both, 0].mean() if both.any() else np.nan,
            "pr_auc": curves[both, 1].mean() if both.any() else np.nan,
            "log_loss": weights @ self._log_loss / total,
            "calibration_error": self._calibration_error(weights),
        }
        for index, label in enumerate(self.labels):
            values[f"class/{label}/rows"] = support[index]
            for name, each in (("precision", precision), ("recall", recall), ("f1", f1)):
                values[f"class/{label}/{name}"] = each[index] if self._present[index] else np.nan
        return {name: float(value) for name, value in values.items()}

    def confusion(self, weights: np.ndarray | None = None) -> np.ndarray:
        """[classes, classes]: rows of class i that were predicted as class j."""
        count = len(self.labels)
        return np.bincount(self._cell, weights, minlength=count * count).reshape(count, count)

    def reliability(self) -> list[dict[str, float]]:
        """Per bin of confidence that has rows: its mean confidence, its accuracy and its rows."""
        rows, confidence, correct = self._bins(np.ones(self.rows))
        filled = np.flatnonzero(rows)
        columns = zip(confidence[filled], correct[filled], rows[filled], strict=True)
        return [{"confidence": c / n, "accuracy": hits / n, "rows": float(n)} for c, hits, n in columns]

    def _calibration_error(self, weights: np.ndarray) -> float:
        """Expected calibration error of the predicted class (Guo et al. 2017), over bins of equal width."""
        _, confidence, correct = self._bins(weights)
        return float(np.abs(confidence - correct).sum() / weights.sum())

    def _bins(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Sums over each bin: weights, confidence, correct."""
        rows, confidence, correct = (
            np.bincount(self._bin, weights * part, minlength=CALIBRATION_BINS)
            for part in (1.0, self._confidence, self._correct)
        )
        return rows, confidence, correct


def regression(
    target: np.ndarray, predicted: np.ndarray, groups: Mapping[str, np.ndarray] = MappingProxyType({})
) -> Callable[[np.ndarray], dict[str, float]]:
    """r2, mae and rmse of predictions [n] as a function of row weights, and mae and rmse by group.

    groups: for each kind of group, for example cohort, the group of each row [n].
    """
    error = predicted.astype(np.float64) - target
    members = {
        f"{kind}/{name}": of_row == name for kind, of_row in groups.items() for name in np.unique(of_row).tolist()
    }

    def values(weights: np.ndarray) -> dict[str, float]:
        mae, mse = _mean(np.abs(error), weights), _mean(error**2, weights)
        spread = _mean((target - _mean(target, weights)) ** 2, weights)
        result = {"r2": 1.0 - mse / spread if spread > 0 else np.nan, "mae": mae, "rmse": float(np.sqrt(mse))}
        for name, member in members.items():
            own = weights * member
            result[f"{name}/rows"] = float(own.sum())
            result[f"{name}/mae"] = _mean(np.abs(error), own)
            result[f"{name}/rmse"] = float(np.sqrt(_mean(error**2, own)))
        return result

    return values


def bootstrap_weights(rows: int, samples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each of `rows` rows is drawn, for each bootstrap sample: float64 [rows]."""
    generator = np.random.default_rng(seed)
    for _ in range(samples):
        yield np.bincount(generator.integers(0, rows, rows), minlength=rows).astype(np.float64)


def interval(value: float, samples: np.ndarray) -> dict[str, float | None]:
    """The value with its 95 % percentile interval; null where it is not defined."""
    known = samples[np.isfinite(samples)]
    if not np.isfinite(value) or not len(known):
        return {"value": None, "low": None, "high": None}
    low, high = np.percentile(known, [2.5, 97.5])
    return {"value": value, "low": float(low), "high": float(high)}


def ranking(score: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row order by falling score, whether each is positive, and the last position of each group of equal scores."""
    order = np.argsort(-score, kind="stable")
    ranked = score[order]
    ends = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))
    return order, positive[order].astype(np.float64), ends


def areas(ranked: tuple[np.ndarray, np.ndarray, np.ndarray], weights: np.ndarray) -> tuple[float, float]:
    """Area under the ROC curve, and average precision, of what `ranking` gave."""
    order, positive, ends = ranked
    drawn = weights[order]
    hits, seen = np.cumsum(drawn * positive)[ends], np.cumsum(drawn)[ends]
    misses = seen - hits
    if hits[-1] == 0 or misses[-1] == 0:
        return np.nan, np.nan
    steps = np.diff(hits, prepend=0.0)
    # Trapezoids: a group of equal scores counts half of the pairs within it.
    roc = np.sum((hits - steps / 2) * np.diff(misses, prepend=0.0)) / (hits[-1] * misses[-1])
    return float(roc), float(np.sum(steps * _ratio(hits, seen)) / hits[-1])


def _mean(values: np.ndarray, weights: np.ndarray) -> float:
    total = weights.sum()
    return float(weights @ values / total) if total > 0 else np.nan


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole, 0 where there is nothing."""
    return np.divide(part, whole, out=np.zeros(len(part)), where=whole > 0)
