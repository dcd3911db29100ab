"""How ticket routing is scored from the predictions that are kept, and what it is held against. Torch-free."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dist_train.metrics import Classification
from dist_train.prepared import load_facts
from recipes.ticket_routing.stored import StoredSplit

METRIC = "macro_f1"
"""Picks the best checkpoint unless eval.metric names another of METRICS; higher is better."""
METRICS = ("macro_f1", "accuracy")
HEADLINE = ("accuracy", "macro_f1", "log_loss", "calibration_error")
"""The metrics of the summary table."""
COMPARED = ("accuracy", "macro_f1")
"""The metrics by which the report says whether the model beats a baseline."""
# Its features are held in memory: millions of tickets would fill it.
_MOST_BASELINE_ROWS = 200_000
BASELINES = {
    "ngram": f"TF-IDF of words and word pairs + logistic regression, on at most {_MOST_BASELINE_ROWS:,} training rows",
    "majority": "always the largest queue",
}

_SPLITS = ("validation", "test")
# Changes whenever a baseline would be trained differently.
_BASELINE_VERSION = 1
_NGRAM = {"ngram_range": (1, 2), "min_df": 2, "sublinear_tf": True, "dtype": np.float32}
_REGRESSION = {"max_iter": 300, "tol": 1e-3}
# The inverse strength of the regularisation is chosen on the validation split: a weak baseline would prove nothing.
_STRENGTHS = (1.0, 3.0, 10.0, 30.0)


def prediction_table(rows: pa.Table, probability: np.ndarray, labels: list[str]) -> pa.Table:
    """One line a row: row, id, label, predicted, probability [labels]; the label names in the schema's metadata."""
    values = pa.array(np.ascontiguousarray(probability, dtype=np.float32).reshape(-1))
    table = pa.table(
        {
            "row": rows["row"],
            "id": rows["id"],
            "label": rows["label"],
            "predicted": pa.array(probability.argmax(1).astype(np.int32)),
            "probability": pa.FixedSizeListArray.from_arrays(values, len(labels)),
        }
    )
    return table.replace_schema_metadata({b"labels": json.dumps(labels).encode()})


def metrics(table: pa.Table, labels: list[str]) -> dict[str, float]:
    """Point values for the training's own evaluations; `loss` is the log loss."""
    values = _classification(table, labels).values()
    return {"loss": values["log_loss"], "accuracy": values["accuracy"], "macro_f1": values["macro_f1"]}


def measure(table: pa.Table) -> Classification:
    """All metrics of a predictions table, as a function of row weights."""
    return _classification(table, json.loads(table.schema.metadata[b"labels"]))


def figures(measures: dict[str, Classification], classes: dict[str, Any]) -> list[dict[str, str]]:
    """The report's figures of one split, each with title, caption and image; `classes`: the intervals per class."""
    from dist_train import plots

    model = measures["model"]
    return [
        plots.confusion(model.confusion(), model.labels),
        plots.reliability({name: measures[name].reliability() for name in ("model", "ngram")}),
        plots.per_class(classes, "f1"),
    ]


def baselines(prepared: Path, report: Callable[[str], None]) -> dict[str, dict[str, pa.Table]]:
    """Predictions of each baseline for validation and test, trained on the training split of the prepared folder.

    They depend on the split alone, so they are kept beside it and trained once, if the folder can be written.
    """
    described = json.dumps([_BASELINE_VERSION, _NGRAM, _REGRESSION, _STRENGTHS], default=str)
    folder = prepared / f"baselines-{hashlib.sha256(described.encode()).hexdigest()[:8]}"
    files = {(name, split): folder / f"{name}-{split}.parquet" for name in BASELINES for split in _SPLITS}
    if all(path.is_file() for path in files.values()):
        tables = {key: pq.read_table(path) for key, path in files.items()}
    else:
        began = time.monotonic()
        report(f"training the baseline: {BASELINES['ngram']}")
        tables = _train_baselines(prepared)
        with contextlib.suppress(OSError):  # another user's cache, a read-only or a full one: trained again next time
            folder.mkdir(exist_ok=True)
            for key, table in tables.items():
                temporary = files[key].with_suffix(f".{os.getpid()}.tmp")
                pq.write_table(table, temporary)
                os.replace(temporary, files[key])
        report(f"baseline trained in {time.monotonic() - began:.1f} s")
    return {name: {split: tables[name, split] for split in _SPLITS} for name in BASELINES}


def _train_baselines(prepared: Path) -> dict[tuple[str, str], pa.Table]:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    labels = load_facts(prepared)["labels"]
    train = StoredSplit(prepared, "train")
    held_out = {split: StoredSplit(prepared, split) for split in _SPLITS}
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
    seen = {split: vectorizer.transform(stored.texts()) for split, stored in held_out.items()}
    best = -1.0
    tables: dict[tuple[str, str], pa.Table] = {}
    for strength in _STRENGTHS:
        model = LogisticRegression(C=strength, **_REGRESSION).fit(counts, truth)
        # Every label has training rows (data.py sees to it), so the columns are the labels' indices.
        probability = {split: model.predict_proba(features) for split, features in seen.items()}
        predicted = {split: prediction_table(rows[split], probability[split], labels) for split in _SPLITS}
        reached = metrics(predicted["validation"], labels)[METRIC]
        if reached > best:
            best = reached
            tables |= {("ngram", split): table for split, table in predicted.items()}
    share = np.bincount(train.labels, minlength=len(labels)) / len(train)
    for split, table in rows.items():
        tables["majority", split] = prediction_table(table, np.tile(share, (table.num_rows, 1)), labels)
    return tables


def _baseline_rows(count: int) -> np.ndarray:
    """Which of `count` training rows the n-gram baseline learns from, rising."""
    if count <= _MOST_BASELINE_ROWS:
        return np.arange(count)
    generator = np.random.Generator(np.random.Philox(key=0))
    return np.sort(generator.choice(count, _MOST_BASELINE_ROWS, replace=False, shuffle=False))


def _classification(table: pa.Table, labels: list[str]) -> Classification:
    flat = table["probability"].combine_chunks().values.to_numpy()
    truth, predicted = table["label"].to_numpy(), table["predicted"].to_numpy()
    return Classification(truth, predicted, flat.reshape(-1, len(labels)), labels)
