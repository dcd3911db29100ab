"""Image folders (a folder a class, perhaps below train, validation and test) and masks beside them. Torch-free."""

from __future__ import annotations

import os
from pathlib import Path

from dist_train.errors import ConfigError, DataError
from dist_train.image_files import IMAGE_SUFFIXES, images_below
from recipes.defect_detection.config import DataConfig
from recipes.defect_detection.listing import NO_SPLIT, TEST, TRAIN, Items, Listing, Row, counted, split_of

_NAN = float("nan")


def list_folder(data: DataConfig) -> Listing:
    """The images below data.path. ConfigError, DataError for a folder that is laid out otherwise."""
    assert data.path is not None
    root = os.path.abspath(data.path)
    masks = os.path.abspath(data.mask_path) if data.mask_path is not None else None
    if masks == root:
        raise ConfigError(f"data.mask_path is data.path itself, {root}: put the masks into a folder of their own.")
    found, others = images_below(root, masks)
    if not found:
        raise DataError(f"data.path is {data.path}, a folder without images below: {_allowed()}.", "data.path")
    parts = [name.split("/") for name in found]
    splits = _split_folders({part[0] for part in parts if len(part) > 1}, data)
    depth = 1 if splits else 0
    if all(len(part) <= depth + 1 for part in parts):
        raise DataError(
            f"data.path is {data.path}, whose {len(found)} images lie in no folders: put the images of each class into "
            "a folder of its name, or name a table of files and labels.",
            "data.path",
        )
    listing = Listing(data.path, [], {"kind": "folder"})
    items = Items(data)
    for name, part in zip(found, parts, strict=True):
        if len(part) <= depth + 1:
            listing.problems.append(f"{name}: lies in no folder of a class")
            continue
        split = splits[part[0]] if splits else NO_SPLIT
        listing.rows.append(Row(name, f"{root}/{name}", part[depth].strip(), _NAN, items.of(name, part[-1]), split))
    listing.warnings += items.check(data)
    if others:
        listing.warnings.append(f"left out as no images by their endings: {counted(others, 'files')}")
    if masks is not None:
        add_masks(listing, data, masks)
    return listing


def _allowed() -> str:
    return f"allowed are {', '.join(sorted(IMAGE_SUFFIXES))}"


def _split_folders(tops: set[str], data: DataConfig) -> dict[str, int] | None:
    """The split that each top folder stands for; None where they are classes."""
    splits = {name: split_of(name) for name in tops}
    known = {name: split for name, split in splits.items() if split is not None}
    if len(known) == len(tops) and tops and TRAIN in known.values():
        return known
    if TRAIN in known.values() and TEST in known.values():
        others = sorted(tops - set(known))
        raise ConfigError(
            f"data.path is {data.path}, which holds {', '.join(sorted(known))} and also {', '.join(others)}: if these "
            "are the splits, move the others out; a folder of masks below it is named with data.mask_path.",
            "data.path",
            "data.mask_path",
        )
    return None


def add_masks(listing: Listing, data: DataConfig, root: str) -> None:
    """Give each image the mask of its name: `scratch/07.jpg` that of `scratch/07.png` or `scratch/07_mask.png`, with or
    without the split's folder. What is left over is a problem."""
    if not os.path.isdir(root):
        raise DataError(f"data.mask_path is {data.mask_path}, but there is no such folder.", "data.mask_path")
    found, _ = images_below(root)
    if not found:
        raise DataError(f"data.mask_path is {data.mask_path}, a folder without masks below.", "data.mask_path")
    by_stem: dict[str, str] = {}
    for name in found:
        stem = os.path.splitext(name)[0]
        if stem in by_stem:
            listing.problems.append(f"{root}/{name}: a second mask beside {by_stem[stem]}")
        by_stem[stem] = name
    used: set[str] = set()
    for index, row in enumerate(listing.rows):
        stem = os.path.splitext(row.id)[0]
        stems = [stem, stem.partition("/")[2]] if row.split != NO_SPLIT else [stem]
        match = next((by_stem[name + end] for name in stems for end in ("", "_mask") if name + end in by_stem), None)
        if match is not None:
            if match in used:
                listing.problems.append(f"{root}/{match}: is the mask of several images, one of them {row.id}")
            used.add(match)
            listing.rows[index] = row._replace(mask=f"{root}/{match}")
    listing.problems += [f"{root}/{name}: a mask without an image" for name in found if name not in used]
    listing.has_masks = True


def path_beside(root: Path | str, name: str) -> str:
    """A file that a table or an annotation names, relative to its own folder."""
    return os.path.normpath(os.path.join(root, name))
