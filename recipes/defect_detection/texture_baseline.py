"""The classical baseline: texture features and gradient boosting or logistic regression, whichever the validation split
prefers; where the model learns from good parts alone so does it, by the distance from their Gaussian. Torch-free."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dist_train.baselines import SPLITS, Tables
from dist_train.metrics import Classification
from dist_train.prepared import load_facts
from recipes.defect_detection.predictions import make_table, read_header
from recipes.defect_detection.sampling import prior_correction
from recipes.defect_detection.stored import StoredImages
from recipes.defect_detection.texture_store import compute_textures

# Boosting sorts every feature of every row in memory.
_MOST_ROWS = 20_000
_VERSION = 2
_STRENGTHS = (0.03, 0.3, 3.0)
_BOOSTING = {"max_iter": 200, "learning_rate": 0.06, "max_leaf_nodes": 15, "l2_regularization": 1.0, "random_state": 0}
_BOOSTING["early_stopping"] = False  # it would need two images of each class
ABOUT = f"texture features + boosting or logistic regression, on at most {_MOST_ROWS:,} training images"
DESCRIBED = [_VERSION, _MOST_ROWS, _STRENGTHS, _BOOSTING]


def train(prepared: Path, one_class: bool) -> Tables:
    """Predictions of both baselines for validation and test, from the training split; one_class: its good parts."""
    facts, stored = load_facts(prepared), StoredImages(prepared)
    labels = facts["labels"]
    every_row = stored.rows("train")
    if one_class:
        every_row = every_row[stored.labels[every_row] == read_header(facts).good]
    counts = np.bincount(stored.labels[every_row], minlength=len(labels))
    train_rows = at_most(every_row, stored.labels[every_row], _MOST_ROWS)
    truth = stored.labels[train_rows]
    rows = {split: stored.rows(split) for split in SPLITS}
    features = {split: compute_textures(prepared, chosen, _silent) for split, chosen in rows.items()}
    seen = compute_textures(prepared, train_rows, _silent)
    learns = len(np.unique(truth)) > 1
    header = read_header(facts, one_class=not learns)
    if not learns:
        answer = _nothing_learnt(len(labels), int(truth[0]))
    else:
        answer = _chosen_model(seen, truth, features["validation"], stored.labels[rows["validation"]], labels)
        # Of the commoner classes it saw fewer than there are.
        seen_counts = np.bincount(truth, minlength=len(labels))
        answer = _with_shares(answer, prior_correction(seen_counts / len(truth), counts / counts.sum(), 0.0))
    shares = counts / counts.sum()
    tables: Tables = {}
    for split, chosen in rows.items():
        lines = stored.table.take(chosen)
        outputs = {"probability": answer(features[split])}
        if header.one_class:
            outputs["feature"] = (features[split] - seen.mean(0)) / np.maximum(seen.std(0), 1e-6)
        tables["texture", split] = make_table(lines, outputs, header)
        constant = np.tile(shares, (len(chosen), 1))
        tables["majority", split] = make_table(lines, {**outputs, "probability": constant, **_blank(outputs)}, header)
    return tables


def _chosen_model(
    seen: np.ndarray, truth: np.ndarray, judged: np.ndarray, judged_truth: np.ndarray, labels: list[str]
) -> Callable[[np.ndarray], np.ndarray]:
    """The candidate of the highest PR-AUC on the validation split: a weak baseline would prove nothing."""
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    candidates: list[Any] = [
        make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=500)) for strength in _STRENGTHS
    ]
    candidates.append(HistGradientBoostingClassifier(**_BOOSTING))
    best, chosen = -1.0, None
    for candidate in candidates:
        candidate.fit(seen, truth)
        probability = _every_label(candidate, judged, len(labels))
        reached = Classification(judged_truth, probability.argmax(1), probability, labels).values()["pr_auc"]
        if chosen is None or reached > best:
            best, chosen = reached, candidate
    return lambda features: _every_label(chosen, features, len(labels))


def _every_label(model: Any, features: np.ndarray, num_labels: int) -> np.ndarray:
    """Probabilities [n, labels]. A label without rows to learn from has no column in the model."""
    probability = np.zeros((len(features), num_labels))
    probability[:, model.classes_] = model.predict_proba(features)
    return probability


def _nothing_learnt(num_labels: int, only: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda features: np.tile(np.eye(num_labels)[only], (len(features), 1))


def _blank(outputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Features that say nothing, where there are some."""
    return {"feature": np.zeros_like(outputs["feature"])} if "feature" in outputs else {}


def _with_shares(answer: Callable[[np.ndarray], np.ndarray], correction: np.ndarray) -> Callable[..., np.ndarray]:
    """Probabilities under other class shares; see `prior_correction`."""

    def corrected(features: np.ndarray) -> np.ndarray:
        weighed = answer(features) * np.exp(correction)
        return weighed / weighed.sum(1, keepdims=True)

    return corrected


def at_most(rows: np.ndarray, labels: np.ndarray, most: int) -> np.ndarray:
    """At most so many of the rows [n], rising: all of the rarer classes, and of each commoner one equally many, drawn
    at random. labels: [n]."""
    counts, cap = np.sort(np.bincount(labels)), most
    for index, count in enumerate(counts):
        cap = (most - int(counts[:index].sum())) // (len(counts) - index)
        if count > cap:
            break
    else:
        return rows
    generator = np.random.Generator(np.random.Philox(key=0))
    chosen = [rows[labels == label] for label in np.unique(labels)]
    kept = [own if len(own) <= cap else generator.choice(own, cap, replace=False, shuffle=False) for own in chosen]
    return np.sort(np.concatenate(kept))


def _silent(text: str) -> None:
    """The report says itself that a baseline is trained."""
