"""The one-class mode's decision: how far an image's features lie from those of good parts. Torch-free.

The network has learnt to tell good parts from ones with drawn and pasted defects (Li et al. 2021, "CutPaste"); a
Gaussian over its features then says what is unlike any good part. No defective part is needed, for thresholds either.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

# Of the validation split's good parts this share sets the Gaussian, the others the thresholds.
_FITTED_SHARE = 0.5
_COMPONENTS = 32
# Good parts that are reviewed, and rejected, of those the thresholds are set by.
REVIEWED_SHARE, REJECTED_SHARE = 0.05, 0.01
# So many parts set a threshold that one more good part exceeds with a chance of REJECTED_SHARE.
_LEAST_PARTS = round(1 / REJECTED_SHARE) - 1


def few_parts(count: int) -> str | None:
    """What is to be said where there are too few good validation parts for the stated share of rejects; else None."""
    needed = int(np.ceil(_LEAST_PARTS / (1 - _FITTED_SHARE)))
    if count >= needed:
        return None
    return (
        f"the validation split has {count} good images; where the model learns from good parts alone, {needed} are "
        f"needed for thresholds that reject {REJECTED_SHARE:.0%} of good parts: with fewer it will be more. Add good "
        "images, or raise data.validation_share"
    )


def calibrate(features: np.ndarray, good: np.ndarray) -> dict[str, Any]:
    """The Gaussian and the thresholds, from the good rows of features [n, d]. good: [n] bool."""
    own = features[good].astype(np.float64)
    cut = max(2, round(len(own) * _FITTED_SHARE))
    gaussian = _fit(own[:cut])
    distances = distance(own[cut:], gaussian) if cut < len(own) else distance(own, gaussian)
    gaussian["scale"] = max(_quantile(distances, 1 - REJECTED_SHARE), 1e-12)
    review = _quantile(distances, 1 - REVIEWED_SHARE)
    probability = review**2 / (review**2 + gaussian["scale"] ** 2)
    return {"gaussian": gaussian, "flag_from": 0.5, "accept_below": float(probability), "reject_from": 0.5}


def distance(features: np.ndarray, gaussian: Mapping[str, Any]) -> np.ndarray:
    """Mahalanobis distance [n] of features [n, d], within the directions that the Gaussian holds and across them."""
    away = features.astype(np.float64) - np.asarray(gaussian["mean"])
    within = away @ np.asarray(gaussian["directions"])
    across = np.maximum((away**2).sum(1) - (within**2).sum(1), 0.0) / gaussian["rest"]
    return np.sqrt((within**2 / np.asarray(gaussian["variances"])).sum(1) + across)


def probability(features: np.ndarray, gaussian: Mapping[str, Any]) -> np.ndarray:
    """[n, 2]: 0.5 where the distance is that which only REJECTED_SHARE of good parts exceed, rising with it. An order
    and a threshold, no calibrated probability: nothing is known of defective parts."""
    square = distance(features, gaussian) ** 2
    defective = square / (square + gaussian["scale"] ** 2)
    return np.stack([1 - defective, defective], 1)


def _fit(features: np.ndarray) -> dict[str, Any]:
    """Mean, and the shrunk covariance (Ledoit and Wolf 2004) by its largest principal directions; what lies across them
    has one variance."""
    from sklearn.covariance import LedoitWolf

    estimate = LedoitWolf().fit(features)
    variances, directions = np.linalg.eigh(estimate.covariance_)
    count = min(_COMPONENTS, len(variances))
    rest = variances[:-count] if count < len(variances) else variances[:1]
    return {
        "mean": estimate.location_.tolist(),
        "directions": directions[:, -count:].tolist(),
        "variances": np.maximum(variances[-count:], 1e-12).tolist(),
        "rest": float(max(rest.mean(), 1e-12)),
    }


def _quantile(values: np.ndarray, share: float) -> float:
    """The value that a further good part exceeds with a chance of at most 1 - share, where there are enough of them
    (split conformal prediction, Vovk et al. 2005)."""
    place = min(int(np.ceil((len(values) + 1) * share)), len(values)) - 1
    return float(np.sort(values)[place])
