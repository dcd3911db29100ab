"""The table of kept predictions, a line an image: what it was, what the model said, where it looked. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from scipy.ndimage import maximum_filter

BINARY = ["good", "defective"]
"""The labels where the target is good or defective."""
DEFECTIVE = 1
"""Index of the latter among them."""
NEAR = 1 / 32
"""Share of an image's longer side that a point may lie aside of a mask and still be near it."""
HITS = tuple(f"{point}_{where}_mask" for where in ("in", "near") for point in ("peak", "centre", "random_point"))
"""Columns of images with masks: 1 or 0 for a point that lies in or near the mask, of a random one the probability."""


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
    labels, binary = facts["labels"], is_binary(facts)
    good = 0 if binary else labels.index(facts["good"]) if facts["good"] in labels else None
    return Header(labels, good, binary, one_class)


def is_binary(facts: Mapping[str, Any]) -> bool:
    """Whether the target is good or defective; two classes may be called so too."""
    # Models that were saved before the facts said so are told by the labels.
    return bool(facts.get("is_binary", facts["labels"] == BINARY))


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
    """Of each image with a mask, else null: whether the heat map's peak lies in the mask, whether the image's middle
    does, and the mask's share of the image, which is how often a random point would.

    `near`: the same of all that is within NEAR of the image's longer side of the mask (the pointing game of Zhang et
    al. 2018, "Top-Down Neural Attention by Excitation Backprop", allows 15 pixels of some 500).
    """
    columns: dict[str, list[Any]] = {name: [] for name in HITS}
    for (y, x), mask in zip(peaks.tolist(), masks, strict=True):
        if mask is None or not mask.any():
            values: list[Any] = [None] * len(HITS)
        else:
            height, width = mask.shape
            peak = min(int(y * height), height - 1), min(int(x * width), width - 1)
            near = maximum_filter(mask, size=2 * round(NEAR * max(mask.shape)) + 1)
            middle = height // 2, width // 2
            values = [bool(mask[peak]), bool(mask[middle]), float(mask.mean())]
            values += [bool(near[peak]), bool(near[middle]), float((near > 0).mean())]
        for name, value in zip(HITS, values, strict=True):
            columns[name].append(value)
    return {name: pa.array(values, pa.float64()) for name, values in columns.items()}
