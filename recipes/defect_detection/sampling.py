"""Which training images an epoch shows how often, and what class shares the model then learns. Torch-free."""

from __future__ import annotations

import numpy as np

from dist_train.data import mix64

# A repeated image's id: far above any row number, so that each repetition is augmented in its own way.
_REPETITION = 1 << 40


def repeated_rows(rows: np.ndarray, labels: np.ndarray, balanced_share: float | None) -> tuple[np.ndarray, np.ndarray]:
    """(rows, ids) of an epoch: the rows as they are, and those of rarer classes again until each class has
    `balanced_share` of the commonest one's rows. A pure function: the order in which they come is the toolkit's.

    rows, labels: [n]. What does not come out even is repeated for those rows that a hash of their number picks.
    """
    chosen, ids = [rows], [rows]
    if balanced_share is not None:
        counts = np.bincount(labels)
        for label in np.flatnonzero(counts):
            own = rows[labels == label]
            lacking = int(np.ceil(balanced_share * counts.max())) - len(own)
            shuffled = own[np.argsort(mix64(own.astype(np.uint64)), kind="stable")]
            for repetition, start in enumerate(range(0, lacking, len(own)), start=1):
                again = np.sort(shuffled[: lacking - start])
                chosen.append(again)
                ids.append(again + repetition * _REPETITION)
    return np.concatenate(chosen), np.concatenate(ids)


def logit_adjustment(shares: np.ndarray, strength: float) -> np.ndarray:
    """What is added to the logits in training [classes], so that what they learn is nearer to classes of equal shares
    (Menon et al. 2021, "Long-tail learning via logit adjustment"). shares: of the classes as sampled."""
    return strength * np.log(np.maximum(shares, 1e-6))


def prior_correction(shares: np.ndarray, wanted: np.ndarray, strength: float) -> np.ndarray:
    """What is added to the logits in evaluation [classes], so that probabilities are those under class shares `wanted`,
    whatever shares the training was sampled with and its logits adjusted by (Saerens et al. 2002)."""
    return logit_adjustment(shares, strength) + np.log(np.maximum(wanted, 1e-6)) - np.log(np.maximum(shares, 1e-6))
