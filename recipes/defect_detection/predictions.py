"""The table of kept predictions, a line an image: what it was, what the model said, where it looked. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

BINARY = ["good", "defective"]
"""The labels where the target is good or defective."""
DEFECTIVE = 1
"""Index of the latter among them."""


@dataclass(frozen=True)
class Header:
    """What the table's metadata says of all its rows."""

    labels: list[str]
    good: int | None
    """Index of the label of good parts."""
    is_binary: bool
    """Good or defective, whatever the kind of defect."""
    one_class: bool = False
    """Trained on good parts alone."""
    heat_shape: tuple[int, int] | None = None


def read_header(facts: Mapping[str, Any], one_class: bool = False) -> Header:
    """From the facts of prepared data."""
    labels, is_binary = facts["labels"], facts["labels"] == BINARY
    good = 0 if is_binary else labels.index(facts["good"]) if facts["good"] in labels else None
    return Header(labels, good, is_binary, one_class)


def make_table(rows: pa.Table, outputs: Mapping[str, np.ndarray], header: Header, masks: Any = None) -> pa.Table:
    """rows: columns row, id, item, label, type, defect_px of the images. outputs: probability [n, labels], perhaps peak
    [n, 2], heat [n, h, w], feature [n, d], readable [n]. masks: for each image its mask [height, width], or None."""
    columns = {name: rows[name] for name in ("row", "id", "item", "label", "type", "defect_px")}
    columns["probability"] = as_lists(outputs["probability"])
    if "readable" in outputs:
        columns["readable"] = pa.array(outputs["readable"] > 0)
    if "peak" in outputs:
        columns["peak_y"], columns["peak_x"] = (pa.array(outputs["peak"][:, axis]) for axis in (0, 1))
        heat = outputs["heat"]
        columns["heat"] = as_lists(heat.reshape(len(heat), -1).astype(np.float16))
        header = Header(header.labels, header.good, header.is_binary, header.one_class, heat.shape[1:])
    if masks is not None:
        columns |= _hits(outputs["peak"], masks)
    if "feature" in outputs:
        columns["feature"] = as_lists(outputs["feature"])
    return pa.table(columns).replace_schema_metadata({b"header": json.dumps(header.__dict__).encode()})


def header_of(table: pa.Table) -> Header:
    values = json.loads(table.schema.metadata[b"header"])
    shape = values.pop("heat_shape")
    return Header(**values, heat_shape=None if shape is None else tuple(shape))


def probabilities(table: pa.Table) -> np.ndarray:
    """[n, labels] float64."""
    return lists_of(table, "probability").astype(np.float64)


def with_probabilities(table: pa.Table, probability: np.ndarray) -> pa.Table:
    """The table with other probabilities [n, labels]."""
    return table.set_column(table.column_names.index("probability"), "probability", as_lists(probability))


def lists_of(table: pa.Table, name: str) -> np.ndarray:
    """A column of lists of one length as an array [n, length]."""
    lists = table[name].combine_chunks()
    return lists.values.to_numpy(zero_copy_only=False).reshape(-1, lists.type.list_size)


def as_lists(values: np.ndarray) -> pa.FixedSizeListArray:
    values = values.astype(np.float32) if values.dtype == np.float64 else values
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(values).reshape(-1)), values.shape[1])


def _hits(peaks: np.ndarray, masks: Any) -> dict[str, Any]:
    """Whether the heat map's peak lies in the mask, whether the image's middle does, and the mask's share of the image,
    which is how often a random point would; null without a mask."""
    in_mask: list[bool | None] = []
    centre: list[bool | None] = []
    share: list[float | None] = []
    for (y, x), mask in zip(peaks.tolist(), masks, strict=True):
        marked = mask is not None and mask.any()
        height, width = mask.shape if marked else (0, 0)
        in_mask.append(bool(mask[min(int(y * height), height - 1), min(int(x * width), width - 1)]) if marked else None)
        centre.append(bool(mask[height // 2, width // 2]) if marked else None)
        share.append(float(mask.mean()) if marked else None)
    return {
        "peak_in_mask": pa.array(in_mask, pa.bool_()),
        "centre_in_mask": pa.array(centre, pa.bool_()),
        "mask_share": pa.array(share, pa.float64()),
    }
