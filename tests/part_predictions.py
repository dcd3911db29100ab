"""Tables of kept predictions of parts that are good or defective, made up for tests."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from recipes.defect_detection.predictions import BINARY, Header, make_table


def make_predictions(
    score: np.ndarray, defective: np.ndarray, header: Header | None = None, **more: object
) -> pa.Table:
    """A table of good-or-defective predictions. score, defective: [n]; more: further columns of the rows."""
    count = len(score)
    rows = {
        "row": np.arange(count),
        "id": [f"{index}.png" for index in range(count)],
        "item": [str(index) for index in range(count)],
        "label": defective.astype(np.int32),
        "type": ["scratch" if one else "" for one in defective],
        "defect_px": np.where(defective, 40, -1),
        **more,
    }
    outputs = {"probability": np.stack([1 - score, score], 1)}
    return make_table(pa.table(rows), outputs, Header(BINARY, 0, True))
