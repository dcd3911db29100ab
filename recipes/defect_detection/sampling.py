"""Which training images an epoch shows how often, and what class shares the model then learns. Torch-free."""

from __future__ import annotations

from typing import Any

import numpy as np

from dist_train.data import mix64
from recipes.defect_detection.config import Config
from recipes.defect_detection.predictions import BINARY, DEFECTIVE, is_binary

# A repeated image's id: far above any row number, so that each repetition is augmented in its own way.
_REPETITION = 1 << 40


def is_one_class(config: Config, facts: dict[str, Any]) -> bool:
    """Whether the model learns from good parts alone. facts: of the prepared data."""
    if config.task.mode == "one_class":
        return True
    counts = facts["splits"]["train"]["labels"]
    return config.task.mode == "auto" and is_binary(facts) and not counts.get(BINARY[DEFECTIVE], 0)


def class_counts(config: Config, facts: dict[str, Any]) -> np.ndarray:
    """Training images of each label that the model learns from [labels]."""
    counts = np.array([facts["splits"]["train"]["labels"].get(name, 0) for name in facts["labels"]])
    if is_one_class(config, facts):
        counts[DEFECTIVE] = 0
    return counts


def wanted_counts(counts: np.ndarray, balanced_share: float | None) -> np.ndarray:
    """How many images of each class an epoch shows [labels]."""
    if balanced_share is None:
        return counts
    return np.where(counts > 0, np.maximum(counts, int(np.ceil(balanced_share * counts.max()))), 0)


def repeated_rows(rows: np.ndarray, labels: np.ndarray, balanced_share: float | None) -> tuple[np.ndarray, np.ndarray]:
    """(rows, ids) of an epoch: the rows as they are, and those of rarer classes again until each class has
    `balanced_share` of the commonest one's rows. A pure function: the order in which they come is the toolkit's.

    rows, labels: [n]. What does not come out even is repeated for those rows that a hash of their number picks.
    """
    chosen, ids = [rows], [rows]
    counts = np.bincount(labels)
    for label, wanted in enumerate(wanted_counts(counts, balanced_share).tolist()):
        own = rows[labels == label]
        shuffled = own[np.argsort(mix64(own.astype(np.uint64)), kind="stable")]
        for repetition, there in enumerate(range(len(own), wanted, max(len(own), 1)), start=1):
            again = np.sort(shuffled[: wanted - there])
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
