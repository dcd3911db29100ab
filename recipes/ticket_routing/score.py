"""How ticket routing is scored, from the predictions that are kept. Torch-free."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa

METRIC = "macro_f1"


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
    """Accuracy, macro-F1 and log loss as point values."""
    from sklearn.metrics import accuracy_score, f1_score, log_loss

    truth, predicted = table["label"].to_numpy(), table["predicted"].to_numpy()
    flat = table["probability"].combine_chunks().values.to_numpy()
    indices = np.arange(len(labels))
    return {
        "loss": float(log_loss(truth, flat.reshape(-1, len(labels)).astype(np.float64), labels=indices)),
        "accuracy": float(accuracy_score(truth, predicted)),
        "macro_f1": float(f1_score(truth, predicted, labels=indices, average="macro", zero_division=0)),
    }
