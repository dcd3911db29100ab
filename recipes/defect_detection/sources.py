"""Where the images come from: folder, table, COCO annotations, `datasets` image set, or the generator. Torch-free.

`find_listing` reads names and labels, never an image.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dist_train import datasets_source
from dist_train.errors import ConfigError, DataError
from dist_train.hub import is_offline
from dist_train.table_files import as_text, check_columns, expand_files, read_files
from recipes.defect_detection import synthetic
from recipes.defect_detection.coco import list_coco
from recipes.defect_detection.config import DataConfig
from recipes.defect_detection.file_hashes import hash_files
from recipes.defect_detection.folders import add_masks, list_folder, path_beside
from recipes.defect_detection.listing import NO_SPLIT, Items, Listing, Payload, Row, split_of

_NAN = float("nan")
_TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet", ".gz")


def find_listing(data: DataConfig) -> Listing:
    """Every image of data.path. ConfigError, DataError for what cannot be listed at all; what is wrong with single
    images and rows is in the listing's problems."""
    if data.path is None:
        raise ConfigError(
            "data.path is not set: name your images, for example\n"
            "  data.path=parts/   (a folder a class)\n"
            "  data.path=labels.csv data.file_column=file data.label_column=label\n"
            "To try the toolkit on generated images: dist-train run defect_detection/demo"
        )
    listing = _listing(data)
    if data.folds is not None and any(row.split != NO_SPLIT for row in listing.rows):
        raise ConfigError(
            f"data.folds is {data.folds}, but {listing.where} is split already: set data.folds to null, or let the "
            "toolkit split it.",
            "data.folds",
        )
    return listing


def _listing(data: DataConfig) -> Listing:
    path = data.path
    assert path is not None
    if path == "synthetic":
        _refuse(data, "synthetic", "mask_path", "mask_column", "item_pattern", "item_column", "split_column")
        _refuse_probabilities(data)
        return _list_generated(data)
    if path.lower().endswith(".json"):
        _refuse(data, "a COCO file", "mask_path", "mask_column", "item_column", "split_column")
        _refuse_probabilities(data)
        return list_coco(data)
    sets = datasets_source.open_dataset(path, data.revision, is_offline(data))
    if sets is not None:
        _refuse(data, "a data set", "mask_path", "item_pattern")
        return _list_dataset(sets, data)
    if os.path.isdir(path):
        _refuse(data, "a folder of images", "mask_column", "item_column", "split_column")
        _refuse_probabilities(data)
        return list_folder(data)
    if os.path.exists(path) and not path.lower().endswith(_TABLES):
        raise DataError(
            f"data.path is {path}, which is neither a folder of images nor a table ({', '.join(_TABLES)}) nor a COCO "
            "file (.json).",
            "data.path",
        )
    return _list_table(data)


def _refuse(data: DataConfig, what: str, *keys: str) -> None:
    for key in keys:
        if getattr(data, key) is not None:
            raise ConfigError(
                f"data.{key} is {getattr(data, key)}, which does not go with {what}: set it to null.", f"data.{key}"
            )


def _refuse_probabilities(data: DataConfig) -> None:
    if data.labels_are == "probabilities":
        raise ConfigError(
            f"data.labels_are is probabilities, which {data.path} has none of: set it to classes.",
            "data.labels_are",
        )


def _list_generated(data: DataConfig) -> Listing:
    described = {"kind": "synthetic", "version": synthetic.VERSION, "images": data.images}
    described["synthetic"] = data.synthetic.model_dump()
    rows = []
    for index in range(data.images):
        name = f"synthetic/{index:06d}"
        rows.append(Row(name, "", "", _NAN, name))
    return Listing("synthetic", rows, described, good="good", has_masks=True, generated=True)


def _list_table(data: DataConfig) -> Listing:
    assert data.path is not None
    columns = {data.file_column: "data.file_column", data.label_column: "data.label_column"}
    optional = {"item_column": data.item_column, "mask_column": data.mask_column, "split_column": data.split_column}
    columns |= {name: f"data.{key}" for key, name in optional.items() if name is not None}
    listing = Listing(data.path, [], {"kind": "table"}, has_masks=data.mask_column is not None)
    items, number = Items(data), 0
    first_of: dict[str, int] = {}
    masks: dict[str, int] = {}
    for file in expand_files(data.path, "data.path"):
        root = os.path.abspath(file.path.parent)
        for batch in read_files([file], columns):
            for values in batch:
                number += 1
                where = f"{file.path}: row {number}"
                row = _table_row(values, where, root, data, items, listing.problems)
                if row is None:
                    continue
                if row.file in first_of:
                    listing.problems.append(f"{where} names {row.id}, as row {first_of[row.file]} does")
                    continue
                if row.mask in masks:
                    listing.problems.append(f"{where} has the mask of row {masks[row.mask]}: {row.mask}")
                first_of[row.file] = number
                if row.mask:
                    masks[row.mask] = number
                listing.rows.append(row)
    if not listing.rows and number and all("there is no such file" in problem for problem in listing.problems):
        listing.problems.append(
            f"none of the files is there: data.file_column ({data.file_column}) is taken relative to the table's folder"
        )
    listing.warnings += items.check(data)
    if data.mask_path is not None:
        add_masks(listing, data, os.path.abspath(data.mask_path))
    return listing


def _table_row(
    values: dict[str, str | None], where: str, root: str, data: DataConfig, items: Items, problems: list[str]
) -> Row | None:
    """An image from a line; what is wrong with it is added to the problems."""
    before = len(problems)
    name = (values[data.file_column] or "").strip()
    if not name:
        problems.append(f"{where} names no file in {data.file_column!r}")
        return None
    file = path_beside(root, name)
    if not os.path.isfile(file):
        problems.append(f"{where} names {name}, but there is no such file {file}")
    label, probability = _label(values[data.label_column], where, data, problems)
    split = NO_SPLIT
    if data.split_column is not None:
        split = _split(values[data.split_column], where, problems)
    mask = (values[data.mask_column] or "").strip() if data.mask_column is not None else ""
    if mask:
        mask = path_beside(root, mask)
        if not os.path.isfile(mask):
            problems.append(f"{where} names a mask, but there is no such file {mask}")
    item = items.of(name, name.rpartition("/")[2])
    if data.item_column is not None:
        item = (values[data.item_column] or "").strip()
        if not item:
            problems.append(f"{where} names no part in {data.item_column!r}")
    return Row(name, file, label, probability, item, split, mask) if len(problems) == before else None


def _label(value: Any, where: str, data: DataConfig, problems: list[str]) -> tuple[str, float]:
    text = ("" if value is None else str(value)).strip()
    if not text:
        problems.append(f"{where} has no label in {data.label_column!r}")
        return "", _NAN
    if data.labels_are == "classes":
        return text, _NAN
    try:
        probability = float(text)
    except ValueError:
        probability = _NAN
    if not 0.0 <= probability <= 1.0:
        problems.append(f"{where} has the label {text!r}; allowed are probabilities from 0 to 1 (data.labels_are)")
    return "", probability


def _split(value: str | None, where: str, problems: list[str]) -> int:
    split = split_of(value)
    if split is None:
        problems.append(f"{where} has the split {value!r}; allowed are train, validation and test")
    return NO_SPLIT if split is None else split


def _list_dataset(sets: dict[str, Any], data: DataConfig) -> Listing:
    """The images of a `datasets` folder or hub data set. A lone split, most often "train", is no split."""
    listing = Listing(str(data.path), [], {"kind": "datasets"}, has_masks=data.mask_column is not None)
    parts: list[tuple[int, Any, str]] = []
    fingerprints = []
    for name, dataset in sets.items():
        split = split_of(name) if len(sets) > 1 else NO_SPLIT
        if split is None:
            raise DataError(f"{data.path}: the split {name!r} is not known; allowed are train, validation and test.")
        image = _image_column(dataset, data)
        parts.append((len(listing.rows), dataset, image))
        fingerprints.append([name, str(dataset._fingerprint), len(dataset), image, data.mask_column])
        listing.described["revision"] = datasets_source.resolved_revision(dataset)
        _add_rows(listing, dataset, f"{data.path}{f' ({name})' if name else ''}", name or "row", split, data)
    listing.described["sets"] = fingerprints
    listing.load = lambda start, stop: _load(parts, data.mask_column, start, stop)
    return listing


def _image_column(dataset: Any, data: DataConfig) -> str:
    import datasets

    found = [name for name, kind in dataset.features.items() if isinstance(kind, datasets.Image)]
    if data.file_column in found:
        return data.file_column
    others = [name for name in found if name != data.mask_column]
    if len(others) != 1:
        raise ConfigError(
            f"{data.path} has {len(others) or 'no'} columns of images{': ' if others else ''}{', '.join(others)}; its "
            f"columns are {', '.join(dataset.column_names)}: name one with data.file_column.",
            "data.file_column",
        )
    return others[0]


def _add_rows(listing: Listing, dataset: Any, where: str, name: str, split: int, data: DataConfig) -> None:
    columns = {data.label_column: "data.label_column"}
    for key in ("item_column", "split_column"):
        if getattr(data, key) is not None:
            columns[getattr(data, key)] = f"data.{key}"
    named = columns | ({data.mask_column: "data.mask_column"} if data.mask_column is not None else {})
    check_columns(where, dataset.column_names, named)
    number = 0
    for batch in datasets_source.read_dataset(dataset, where, columns):
        for values in batch:
            here = f"{where}: row {number}"
            identifier = f"{name}/{number:06d}"
            label, probability = _label(values[data.label_column], here, data, listing.problems)
            own = split
            if data.split_column is not None:
                own = _split(values[data.split_column], here, listing.problems)
            item = identifier
            if data.item_column is not None:
                item = as_text(values[data.item_column]) or identifier
            # A row with a problem stays, so that rows and the data set's lines go side by side.
            listing.rows.append(Row(identifier, "", label, probability, item, own))
            number += 1


def _load(parts: list[tuple[int, Any, str]], mask_column: str | None, start: int, stop: int) -> list[Payload]:
    import datasets

    result: list[Payload] = []
    for first, dataset, image in parts:
        low, high = max(start - first, 0), min(stop - first, len(dataset))
        if low >= high:
            continue
        chosen = dataset.select(range(low, high))
        loaded = {}
        for column in (image, *([mask_column] if mask_column else [])):
            loaded[column] = [_file_bytes(value) for value in _undecoded(chosen, column, datasets.Image(decode=False))]
        masks: Sequence[Any] = loaded[mask_column] if mask_column else [None] * (high - low)
        result += zip(loaded[image], masks, strict=True)
    return result


def _undecoded(dataset: Any, column: str, kind: Any) -> list[Any]:
    return list(dataset.select_columns([column]).cast_column(column, kind)[column])


def _file_bytes(value: Any) -> bytes | str | None:
    if value is None:
        return None
    return value["bytes"] if value["bytes"] is not None else value["path"]


def describe_listing(listing: Listing, data: DataConfig) -> dict[str, Any]:
    """Digests of the images with their masks and of all that is said of them, whatever their place on the disk."""
    digest = hashlib.sha256(json.dumps(listing.described, sort_keys=True).encode())
    paths = [row.file for row in listing.rows if row.file]
    outlined = [row.mask for row in listing.rows if row.mask and row.mask[0] != "{"]
    hashes = dict(zip(paths + outlined, hash_files(paths + outlined, _cache(data), str(data.path)), strict=True))
    images = hashlib.sha256(digest.digest())
    for row in listing.rows:
        mask = hashes.get(row.mask, row.mask)
        images.update(json.dumps([hashes.get(row.file, row.id), mask]).encode())
        label = None if math.isnan(row.probability) else row.probability
        digest.update(json.dumps([row.id, row.label, label, row.item, row.split]).encode())
    digest.update(json.dumps(listing.problems).encode())
    return {"images": images.hexdigest(), "labels": digest.hexdigest()}


def _cache(data: DataConfig) -> Path:
    return data.cache_dir.expanduser()
