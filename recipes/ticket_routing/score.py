"""How ticket routing is scored from the predictions that are kept, and what it is held against. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dist_train.baselines import SPLITS, Tables, kept_baselines
from dist_train.calibration import fit_temperature, sharpen
from dist_train.metrics import Classification
from dist_train.prepared import load_facts
from recipes.ticket_routing.config import Config
from recipes.ticket_routing.stored import StoredSplit

METRIC = "macro_f1"
METRICS = ("macro_f1", "accuracy")
HEADLINE = ("accuracy", "macro_f1", "log_loss", "calibration_error")
COMPARED = ("accuracy", "macro_f1")
LOSS = "log_loss"
# Its features are held in memory: millions of tickets would fill it.
_MOST_BASELINE_ROWS = 200_000
_PREDICTED_AT_ONCE = 50_000
BASELINES = {
    "ngram": f"TF-IDF of words and word pairs + logistic regression, on at most {_MOST_BASELINE_ROWS:,} training rows",
    "majority": "always the largest queue",
}

_LEAST_TEMPERATURE = float(np.exp(-3.0))
ROUTE, REVIEW = "route", "review"
"""What becomes of a ticket: it goes to the predicted queue, or a person looks at it."""
# Changes whenever a baseline would be trained differently.
_BASELINE_VERSION = 1
_NGRAM = {"ngram_range": (1, 2), "min_df": 2, "sublinear_tf": True, "dtype": np.float32}
_REGRESSION = {"max_iter": 300, "tol": 1e-3}
# The inverse strength of the regularisation is chosen on the validation split: a weak baseline would prove nothing.
_STRENGTHS = (1.0, 3.0, 10.0, 30.0)


def prediction_table(rows: pa.Table, probability: np.ndarray, labels: list[str]) -> pa.Table:
    """One line a row: row, id, label, predicted, probability [labels]; the label names in the schema's metadata."""
    table = pa.table(
        {
            "row": rows["row"],
            "id": rows["id"],
            "label": rows["label"],
            "predicted": pa.array(probability.argmax(1).astype(np.int32)),
            "probability": _lists(probability),
        }
    )
    return table.replace_schema_metadata({b"labels": json.dumps(labels).encode()})


def measure(table: pa.Table) -> Callable[[np.ndarray], dict[str, float]]:
    """All metrics of a predictions table, as a function of row weights; of decided predictions also which share of the
    tickets is routed without a person, and how many of those rightly."""
    classification = _classification(table)
    if "decision" not in table.column_names:
        return classification.values
    routed = np.array([decision == ROUTE for decision in table["decision"].to_pylist()])
    right = routed & (table["label"].to_numpy() == table["predicted"].to_numpy())

    def values(weights: np.ndarray) -> dict[str, float]:
        share = weights @ routed / weights.sum()
        accuracy = weights @ right / (weights @ routed) if weights @ routed else np.nan
        return {**classification.values(weights), "routed_share": float(share), "routed_accuracy": float(accuracy)}

    return values


def calibrate(validation: pa.Table, config: Config) -> dict[str, Any]:
    """The temperature that makes the validation split likeliest (Guo et al. 2017), and the confidence from which on
    its tickets reach task.target_accuracy: the lowest one; null where none does, and then nothing is routed."""
    probability, truth = _probability(validation), validation["label"].to_numpy()
    temperature = fit_temperature(probability, truth, least=_LEAST_TEMPERATURE)
    confidence = sharpen(probability, temperature).max(1)
    order = np.argsort(-confidence, kind="stable")
    right = (validation["predicted"].to_numpy() == truth)[order]
    accuracy = np.cumsum(right) / np.arange(1, len(right) + 1)
    # Tickets of one confidence are routed together or not at all.
    ends = np.append(np.diff(confidence[order]) != 0, True)
    enough = np.flatnonzero(ends & (accuracy >= config.task.target_accuracy))
    threshold = float(confidence[order][enough[-1]]) if len(enough) else None
    return {"temperature": temperature, "threshold": threshold, "target_accuracy": config.task.target_accuracy}


def decide(table: pa.Table, decision: Mapping[str, Any]) -> pa.Table:
    """Predictions with calibrated probabilities, and what becomes of each ticket."""
    probability = sharpen(_probability(table), decision["temperature"])
    place = table.column_names.index("probability")
    table = table.set_column(place, "probability", _lists(probability))
    return table.append_column("decision", pa.array(decisions(probability, decision["threshold"])))


def decisions(probability: np.ndarray, threshold: float | None) -> list[str]:
    """ROUTE or REVIEW for each row of calibrated probabilities [n, labels]."""
    return [ROUTE if threshold is not None and value >= threshold else REVIEW for value in probability.max(1).tolist()]


def remarks(metrics: Mapping[str, Any]) -> list[str]:
    share, accuracy = (metrics[name] for name in ("routed_share", "routed_accuracy"))
    if accuracy["value"] is None:
        return ["No ticket is routed without a person: the model is nowhere as sure as task.target_accuracy asks for."]
    return [
        f"{share['value']:.1%} of the test tickets are routed without a person, {accuracy['value']:.1%} "
        f"[{accuracy['low']:.1%}, {accuracy['high']:.1%}] of them rightly; the others are for review."
    ]


def details(table: pa.Table) -> dict[str, Any]:
    return {"confusion": _classification(table).confusion().astype(int).tolist()}


def figures(tables: Mapping[str, pa.Table], groups: Mapping[str, Any], prepared: Path) -> list[dict[str, str]]:
    """Confusion matrix, reliability and F1 by queue, of the test split."""
    from dist_train import plots

    measures = {name: _classification(tables[name]) for name in ("model", "ngram")}
    model = measures["model"]
    return [
        plots.confusion(model.confusion(), model.labels),
        plots.reliability({name: measures[name].reliability() for name in measures}),
        plots.per_class(groups["class"], "f1"),
    ]


def baselines(prepared: Path, config: Config, say: Callable[[str], None]) -> dict[str, dict[str, pa.Table]]:
    """Predictions of each baseline for validation and test, trained on the training split of the prepared folder."""
    described = [_BASELINE_VERSION, _NGRAM, _REGRESSION, _STRENGTHS, _MOST_BASELINE_ROWS]
    return kept_baselines(prepared, described, list(BASELINES), BASELINES["ngram"], _train_baselines, say)


def _train_baselines(prepared: Path) -> Tables:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    labels = load_facts(prepared)["labels"]
    train = StoredSplit(prepared, "train")
    held_out = {split: StoredSplit(prepared, split) for split in SPLITS}
    rows = {split: stored.table() for split, stored in held_out.items()}
    chosen = _baseline_rows(len(train))
    truth = train.labels[chosen]
    texts = train.texts(chosen)
    vectorizer = TfidfVectorizer(**_NGRAM)
    try:
        counts = vectorizer.fit_transform(texts)
    except ValueError:  # no word stands twice, or there are no words between spaces
        vectorizer = TfidfVectorizer(**_NGRAM | {"analyzer": "char", "min_df": 1})
        counts = vectorizer.fit_transform(texts)
    validation = held_out["validation"]
    judged = _baseline_rows(len(validation))
    seen, judged_rows = vectorizer.transform(validation.texts(judged)), rows["validation"].take(judged)
    best, chosen_model = -1.0, None
    for strength in _STRENGTHS:
        model = LogisticRegression(C=strength, **_REGRESSION).fit(counts, truth)
        predicted = prediction_table(judged_rows, _every_label(model, seen, len(labels)), labels)
        reached = _classification(predicted).values()[METRIC]
        if reached > best:
            best, chosen_model = reached, model
    tables: Tables = {}
    for split, stored in held_out.items():
        # In parts: the features of millions of rows would fill the memory.
        parts = np.split(np.arange(len(stored)), range(_PREDICTED_AT_ONCE, len(stored), _PREDICTED_AT_ONCE))
        probability = [
            _every_label(chosen_model, vectorizer.transform(stored.texts(part)), len(labels)) for part in parts
        ]
        tables["ngram", split] = prediction_table(rows[split], np.concatenate(probability), labels)
    share = np.bincount(train.labels, minlength=len(labels)) / len(train)
    for split, table in rows.items():
        tables["majority", split] = prediction_table(table, np.tile(share, (table.num_rows, 1)), labels)
    return tables


def _every_label(model: Any, features: Any, num_labels: int) -> np.ndarray:
    """Probabilities [n, labels]. A label without rows to learn from has no column in the regression."""
    probability = np.zeros((features.shape[0], num_labels))
    probability[:, model.classes_] = model.predict_proba(features)
    return probability


def _baseline_rows(count: int) -> np.ndarray:
    """Which of `count` rows the n-gram baseline learns from or is judged by, rising."""
    if count <= _MOST_BASELINE_ROWS:
        return np.arange(count)
    generator = np.random.Generator(np.random.Philox(key=0))
    return np.sort(generator.choice(count, _MOST_BASELINE_ROWS, replace=False, shuffle=False))


def _classification(table: pa.Table) -> Classification:
    truth, predicted = table["label"].to_numpy(), table["predicted"].to_numpy()
    return Classification(truth, predicted, _probability(table), json.loads(table.schema.metadata[b"labels"]))


def _probability(table: pa.Table) -> np.ndarray:
    lists = table["probability"].combine_chunks()
    return lists.values.to_numpy().reshape(-1, lists.type.list_size)


def _lists(probability: np.ndarray) -> pa.FixedSizeListArray:
    values = pa.array(np.ascontiguousarray(probability, dtype=np.float32).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(values, probability.shape[1])
