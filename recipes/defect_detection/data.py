"""Prepare the images: list them, read each once into a memory map, label and split them. Torch-free.

The pixels are kept apart from labels and split (cache.py), so that other folds cost no reading; stored.py reads it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dist_train.config import CachedData
from dist_train.errors import ConfigError, DataError
from dist_train.prepared import load_facts, write_split
from dist_train.pretrained import fetched_model, pretrained_facts
from recipes.defect_detection import cache, images, one_class, texture
from recipes.defect_detection.config import Config, DataConfig
from recipes.defect_detection.labels import GOOD, Labels, choose_labels
from recipes.defect_detection.listing import NO_SPLIT, SPLITS, TRAIN, Row, counted
from recipes.defect_detection.sampling import class_counts, is_one_class, wanted_counts
from recipes.defect_detection.sources import describe_listing, find_listing
from recipes.defect_detection.split import crossing, group_images, split_images
from recipes.defect_detection.texture_store import write_textures

# Changes whenever the same source would be prepared differently.
VERSION = 2
ALL = "all"
# From here on a resized part looks like another one.
_MOST_STRETCH = 1.5
Say = Callable[[str], None]


def describe(config: Config) -> dict[str, Any]:
    """All that the prepared folder depends on: contents, not paths."""
    listing = find_listing(config.data)
    content = describe_listing(listing, config.data)
    elsewhere = {"path", "mask_path", "images", "synthetic"}
    keys = config.data.model_dump(mode="json", exclude=elsewhere | set(CachedData.model_fields))
    versions = [VERSION, cache.VERSION, images.VERSION]
    described = {"versions": versions, "content": content, "keys": keys, "pretrained": config.model.pretrained}
    fetched = fetched_model(config)
    if fetched is not None:
        described["commit"] = fetched.revision  # facts.json names it, and the folder that the ranks read
    return {**described, "texture": texture.VERSION} if config.model.texture else described


def pins(config: Config, say: Say) -> dict[str, str]:
    """The commits that this config's hub names stand for now, by the key that pins them."""
    fetched = fetched_model(config, say)
    return {} if fetched is None else {"model.revision": fetched.revision}


def build(config: Config, folder: Path, say: Say) -> dict[str, Any]:
    """Write the prepared files into `folder`; returns the facts. ConfigError, DataError, StorageError."""
    data, began = config.data, time.monotonic()
    listing = find_listing(data)
    content = describe_listing(listing, data)
    if not listing.generated and not listing.problems:
        _only_test(choose_labels(listing.rows, None, listing.good, data), data)  # what is wrong there is said at once
    say(f"data           {len(listing.rows):,} images in {listing.where}")
    store = cache.store_images(listing, content["images"], data, say)
    kept, records = load_facts(store), cache.read_records(store)
    rows = [listing.rows[slot] for slot in records["slot"].tolist()]
    kinds = records["kind"].tolist() if listing.generated else None
    labels = choose_labels(rows, kinds, listing.good, data)
    split_of, method, leaks = _split(rows, labels, records, data)
    warnings = [*listing.warnings, *labels.warnings]
    warnings += _check_split(split_of, labels, data)
    warnings += _leak_warnings(leaks) + _image_warnings(rows, records, labels, data)
    warnings += [f"left out, as data.most_unreadable allows: {problem}" for problem in kept["unreadable"]]
    cache.link_images(store, folder)
    write_split(folder, "rows", _table(rows, labels, split_of, records))
    conversions = _conversions(records)
    for what, count in conversions.items():
        say(f"data           {count:,} images: {what}")
    say(f"data           took {time.monotonic() - began:.1f} s")
    textures = write_textures(folder, split_of == TRAIN, say) if config.model.texture else {}
    mean, std = _statistics(records[split_of == TRAIN], data)
    facts = {
        "sources": [{"path": str(data.path), "revision": listing.described.get("revision"), **content}],
        "rows": len(rows),
        "items": len({row.item for row in rows}),
        "labels": labels.names,
        "is_binary": data.target == "defective",
        "types": sorted({kind for kind in labels.types if kind}),
        "good": labels.good,
        "size": list(data.height_width),
        "channels": data.channels,
        "bits": kept["bits"],
        "mean": mean,
        "std": std,
        "splits": {name: _counts(labels, split_of == index) for index, name in enumerate(SPLITS)},
        "split": {"method": method, "seed": data.split_seed},
        "leaks": leaks,
        "conversions": conversions,
        "warnings": warnings,
        "smallest_defect_px": data.smallest_defect_px,
        "unreadable": kept["unreadable"],
        "has_masks": bool(records["masked"].any()),
        **textures,
        **pretrained_facts(config, folder),
    }
    check_mode(config, facts)
    few = one_class.few_parts(facts["splits"]["validation"]["labels"].get(GOOD, 0))
    if few is not None and is_one_class(config, facts):
        warnings.append(few)
    for warning in warnings:
        say(f"warning        {warning}")
    return facts


def misfit(then: dict[str, Any], now: dict[str, Any]) -> str | None:
    """Why weights that were trained on data of the facts `then` cannot go on with that of `now`; None if they can."""
    if then["labels"] != now["labels"]:
        return "its classes are other ones. Start a new run."
    if then["channels"] != now["channels"]:
        return f"its images have {now['channels']} channels instead of {then['channels']}. Start a new run."
    return None


def lengths(folder: Path | str) -> Any:
    """Pixels of each training image, as a numpy array: all alike."""
    facts = load_facts(folder)
    return np.full(facts["splits"]["train"]["rows"], int(np.prod(facts["size"])), dtype=np.int64)


def epoch_rows(config: Config, facts: dict[str, Any]) -> int:
    """Images of one epoch: those of rarer classes come again under task.balanced_share, and one-class mode leaves the
    defective ones out."""
    counts = class_counts(config, facts)
    return int(wanted_counts(counts, config.task.balanced_share).sum())


def check_mode(config: Config, facts: dict[str, Any]) -> None:
    """ConfigError where a classifier is asked for and no training image, nor any made one, shows a defect, and where
    defects shall be pasted that no mask shows."""
    if config.augment.paste and not facts["has_masks"]:
        raise ConfigError(
            f"augment.paste is {config.augment.paste}, but no image has a mask to cut a defect out by: name the masks "
            "with data.mask_path or data.mask_column, or set augment.paste to 0.",
            "augment.paste",
        )
    if config.task.mode != "classifier" or config.data.target != "defective":
        return
    if not facts["splits"]["train"]["labels"].get("defective", 0) and not config.augment.scratches:
        raise ConfigError(
            "task.mode is classifier, but no training image shows a defect. Set task.mode to auto or one_class to "
            "learn from good parts alone, or draw defects into them with augment.scratches=0.2.",
            "task.mode",
        )


def _split(
    rows: list[Row], labels: Labels, records: np.ndarray, data: DataConfig
) -> tuple[np.ndarray, str, dict[str, int]]:
    """The split of each image, how it was made, and what might leak."""
    items = [row.item for row in rows]
    hashes = [records[name].tolist() for name in ("file_hash", "pixel_hash")]
    groups = group_images(items, *hashes)
    own = np.array([row.split for row in rows], dtype=np.int8)
    names = {kind: index for index, kind in enumerate(dict.fromkeys(labels.types))}
    strata = np.array([names[kind] for kind in labels.types])
    split_of, method = split_images(
        strata, groups, None if (own == NO_SPLIT).all() else own, _only_test(labels, data), data
    )
    copies = group_images(*hashes)
    sizes = np.bincount(copies)
    pairs = {(copy, label) for copy, label in zip(copies.tolist(), labels.types, strict=True)}
    conflicting = sum(count > 1 for count in Counter(copy for copy, _ in pairs).values())
    leaks = {
        "exact_duplicates": int((sizes[copies] > 1).sum()),
        "duplicates_crossing": crossing(copies.tolist(), split_of),
        "duplicates_with_conflicting_labels": conflicting,
        "items_crossing": crossing(items, split_of),
    }
    return split_of, method, leaks


def _only_test(labels: Labels, data: DataConfig) -> np.ndarray:
    kinds = sorted({kind for kind in labels.types if kind})
    if data.test_only and data.target != "defective":
        raise ConfigError(
            f"data.test_only is {data.test_only}, but data.target is classes: a class that is not trained cannot be "
            "told. Set data.target to defective, or data.test_only to [].",
            "data.test_only",
            "data.target",
        )
    unknown = [kind for kind in data.test_only if kind not in kinds and kind != ALL]
    if unknown:
        raise ConfigError(
            f"data.test_only is {data.test_only}, but there is no such kind of defect; there are: "
            f"{', '.join(map(repr, kinds))}, and [{ALL}] for every kind.",
            "data.test_only",
        )
    chosen = set(kinds if ALL in data.test_only else data.test_only)
    return np.array([kind in chosen for kind in labels.types])


def _check_split(split_of: np.ndarray, labels: Labels, data: DataConfig) -> list[str]:
    """DataError for splits that cannot be trained or scored; warnings."""
    counts = np.zeros((len(SPLITS), len(labels.names)), dtype=np.int64)
    np.add.at(counts, (split_of, labels.labels), 1)
    for name, count in zip(SPLITS, counts.sum(axis=1), strict=True):
        if not count:
            raise DataError(
                f"the {name} split is empty: {len(split_of)} images are too few for these shares, or data.item_column "
                "or data.item_pattern joins too many of them to one part, or data.test_only leaves none."
            )
    needed = labels.names if data.target == "classes" else labels.names[:1]
    for index, label in enumerate(needed):
        lacking = [name for name, count in zip(SPLITS, counts[:, index], strict=True) if not count]
        if lacking:
            raise DataError(
                f"the class {label!r} has {counts[:, index].sum()} image(s), of which none lies in the "
                f"{' and the '.join(lacking)} split: a class needs a part in each of the three.\nAdd images of it, "
                "merge it with another class, or leave it out; where data.item_column or data.item_pattern joins "
                "images to parts, look whether it joins too many."
            )
    if data.target == "classes":
        return []
    found = counts[:, 1]
    if not found.any():
        return ["no image is defective: only what is learnt from good parts alone (task.mode) can be trained on these"]
    return [
        f"the {name} split has no defective image: what is measured there says nothing of defects"
        for name, count in zip(SPLITS[1:], found[1:], strict=True)
        if not count and not (name == "validation" and not found[TRAIN])
    ]


def _leak_warnings(leaks: dict[str, int]) -> list[str]:
    warnings = []
    for key, what in (("duplicates_crossing", "group(s) of identical images"), ("items_crossing", "part(s)")):
        if leaks[key]:
            warnings.append(
                f"{leaks[key]} {what} lie in several splits, as the given split has it: what is measured is too good"
            )
    if leaks["duplicates_with_conflicting_labels"]:
        warnings.append(
            f"{leaks['duplicates_with_conflicting_labels']} group(s) of identical images have different labels"
        )
    return warnings


def _image_warnings(rows: list[Row], records: np.ndarray, labels: Labels, data: DataConfig) -> list[str]:
    """What about sizes, masks and labels is doubtful."""
    warnings = []
    height, width = data.height_width
    if data.fit == "stretch":
        proportions = records["width"] / records["height"] * (height / width)
        far = np.flatnonzero(np.maximum(proportions, 1 / proportions) > _MOST_STRETCH)
        if len(far):
            warnings.append(
                f"data.fit=stretch changes the proportions by more than {_MOST_STRETCH} in {_told(rows, far)}: "
                "data.fit=pad keeps them"
            )
    small = np.flatnonzero((records["smallest_px"] > 0) & (records["smallest_px"] < data.smallest_defect_px))
    if len(small):
        worst = int(small[records["smallest_px"][small].argmin()])
        marked = int((records["defect_px"] > 0).sum())
        warnings.append(
            f"{len(small)} of {marked} images with marked defects have one of fewer than {data.smallest_defect_px} "
            f"pixels at {height}x{width}; the smallest has {records['smallest_px'][worst]}, in {rows[worst].id}, which "
            f"is {records['height'][worst]}x{records['width'][worst]}. A model hardly sees such: raise data.size_px "
            "(and set model.tile_px to look at large images in tiles)"
        )
    good = np.array([kind == "" for kind in labels.types])
    for found, what in (
        (good & (records["defect_px"] > 0), "good, but a defect is marked in"),
        (~good & (records["defect_px"] == 0), "defective, but the mask is empty of"),
        (~good & ~records["masked"] if records["masked"].any() else np.zeros(0), "defective, but no mask goes with"),
    ):
        chosen = np.flatnonzero(found)
        if len(chosen):
            warnings.append(f"labelled {what} {_told(rows, chosen)}")
    return warnings


def _told(rows: list[Row], chosen: np.ndarray) -> str:
    return counted([rows[index].id for index in chosen.tolist()])


def _conversions(records: np.ndarray) -> dict[str, int]:
    found = {}
    for index, what in enumerate(images.NOTES):
        count = int((records["notes"] >> index & 1).sum())
        if count:
            found[what] = count
    return found


def _statistics(records: np.ndarray, data: DataConfig) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, in 0..1."""
    pixels = len(records) * int(np.prod(data.height_width))
    sums, squares = (records[name].sum(axis=0)[: data.channels] for name in ("sums", "squares"))
    mean = sums / pixels / 255
    std = np.sqrt(np.maximum(squares / pixels / 255**2 - mean**2, 0))
    return mean.tolist(), np.maximum(std, 1 / 255).tolist()


def _counts(labels: Labels, chosen: np.ndarray) -> dict[str, Any]:
    counts = np.bincount(labels.labels[chosen], minlength=len(labels.names)).tolist()
    kinds = Counter(kind for kind, here in zip(labels.types, chosen.tolist(), strict=True) if here and kind)
    return {
        "rows": int(chosen.sum()),
        "labels": dict(zip(labels.names, counts, strict=True)),
        "types": dict(sorted(kinds.items())),
    }


def _table(rows: list[Row], labels: Labels, split_of: np.ndarray, records: np.ndarray) -> pa.Table:
    masked = records["masked"]
    targets = pa.ListArray.from_arrays(
        pa.array(np.arange(len(rows) + 1, dtype=np.int32) * len(labels.names)), pa.array(labels.targets.reshape(-1))
    )
    return pa.table(
        {
            "row": np.arange(len(rows)),
            "id": pa.array([row.id for row in rows], pa.string()),
            "item": pa.array([row.item for row in rows], pa.string()),
            "label": labels.labels,
            "target": targets,
            "type": pa.array(labels.types, pa.string()),
            "mask": np.where(masked, np.cumsum(masked) - 1, -1).astype(np.int32),
            "defect_px": records["defect_px"],
            "smallest_px": records["smallest_px"],
            "split": split_of,
            "file": pa.array([row.file for row in rows], pa.string()),
        }
    )
