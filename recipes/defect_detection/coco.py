"""COCO annotations (Lin et al. 2014): boxes, polygons and uncompressed RLE as masks; images without any are good.

Format: https://cocodataset.org/#format-data. Torch-free.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from dist_train.errors import DataError
from recipes.defect_detection.config import DataConfig
from recipes.defect_detection.folders import path_beside
from recipes.defect_detection.listing import Items, Listing, Row, counted

GOOD = "good"
_NAN = float("nan")


def list_coco(data: DataConfig) -> Listing:
    """The images of an annotation file, each under the category of which most is marked in it. DataError."""
    assert data.path is not None
    content = _read(data.path)
    good = data.good_label or GOOD
    listing = Listing(data.path, [], {"kind": "coco"}, good=good, has_masks=True)
    names = {category.get("id"): str(category.get("name", "")).strip() for category in content["categories"]}
    images, marks = {image.get("id"): image for image in content["images"]}, _marks(content, names, listing.problems)
    if len(images) < len(content["images"]):
        listing.problems.append(f"{data.path}: several images have one id")
    roots = _roots(os.path.dirname(os.path.abspath(data.path)))
    root = next((root for root in roots for image in list(images.values())[:1] if _exists(root, image)), roots[0])
    items, seen, several = Items(data), set(), []
    for key, image in images.items():
        name = str(image.get("file_name") or "")
        file = path_beside(root, name)
        if not name:
            listing.problems.append(f"{data.path}: the image {key!r} has no file_name")
        elif name in seen:
            listing.problems.append(f"{data.path}: {name} is listed twice")
        elif not os.path.isfile(file):
            listing.problems.append(f"{data.path} names {name}, but there is no such file {file}")
        else:
            found = marks.pop(key, [])
            areas: dict[str, float] = {}
            for mark in found:
                areas[mark["name"]] = areas.get(mark["name"], 0.0) + mark["area"]
            label = max(areas, key=lambda name: (areas[name], name)) if areas else good
            if len(areas) > 1:
                several.append(name)
            mask = json.dumps(_outlines(image, found)) if found and label != good else ""
            listing.rows.append(Row(name, file, label, _NAN, items.of(name, name.rpartition("/")[2]), mask=mask))
        seen.add(name)
    listing.problems += [
        f"{data.path}: {len(found)} annotation(s) of the image {key!r}, which is not listed"
        for key, found in marks.items()
        if key not in images
    ]
    if several:
        listing.warnings.append(f"defects of several kinds, filed under the largest: {counted(several)}")
    listing.warnings += items.check(data)
    return listing


def _read(path: str) -> dict[str, Any]:
    try:
        with open(path, "rb") as stream:
            content = json.load(stream)
    except OSError as error:
        raise DataError(f"data.path is {path}, which cannot be read: {error.strerror}.", "data.path") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"data.path is {path}, which is no JSON: {error}.", "data.path") from error
    lists = ("images", "annotations", "categories")
    if not isinstance(content, dict) or any(
        not isinstance(content.get(name), list) or not all(isinstance(entry, dict) for entry in content[name])
        for name in lists
    ):
        raise DataError(
            f"data.path is {path}, which is no COCO file: it needs the lists {', '.join(lists)}.", "data.path"
        )
    if not content["images"]:
        raise DataError(f"data.path is {path}, which lists no images.", "data.path")
    return content


def _roots(folder: str) -> list[str]:
    """Where tools put the images: beside the annotations, or in a folder `images` there or one above."""
    above = os.path.dirname(folder)
    return [folder, os.path.join(folder, "images"), os.path.join(above, "images"), above]


def _exists(root: str, image: dict[str, Any]) -> bool:
    return os.path.isfile(path_beside(root, str(image.get("file_name") or "")))


def _marks(content: dict[str, Any], names: dict[Any, str], problems: list[str]) -> dict[Any, list[dict[str, Any]]]:
    """For each image's id its annotations as {name, area, shape}."""
    marks: dict[Any, list[dict[str, Any]]] = {}
    for annotation in content["annotations"]:
        image, where = annotation.get("image_id"), f"the annotation {annotation.get('id')!r}"
        if not names.get(annotation.get("category_id")):
            problems.append(f"{where} has the category {annotation.get('category_id')!r}, which is not listed")
            continue
        try:
            shape, area = _shape(annotation)
        except (ValueError, TypeError, KeyError) as error:
            problems.append(f"{where} of the image {image!r}: {error}")
            continue
        marks.setdefault(image, []).append({"name": names[annotation["category_id"]], "area": area, "shape": shape})
    return marks


def _shape(annotation: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """The outline, and its area. ValueError."""
    segmentation, box = annotation.get("segmentation"), annotation.get("bbox")
    if isinstance(segmentation, dict):
        counts = segmentation["counts"]
        if not isinstance(counts, list):
            raise ValueError("its RLE is compressed: write it uncompressed, or as polygons")
        size = [int(side) for side in segmentation["size"]]
        if any(count < 0 for count in counts) or len(size) != 2 or sum(counts) != size[0] * size[1]:
            raise ValueError(f"its RLE has {sum(counts)} pixels, but its size is {size}")
        return {"rle": [int(count) for count in counts], "size": size}, float(sum(counts[1::2]))
    if segmentation:
        polygons = [[float(value) for value in polygon] for polygon in segmentation]
        if any(len(polygon) < 6 or len(polygon) % 2 or not all(map(math.isfinite, polygon)) for polygon in polygons):
            raise ValueError("a polygon needs at least three points, each of two numbers")
        return {"polygons": polygons}, sum(map(_area, polygons))
    if not box:
        raise ValueError("it has neither a segmentation nor a box")
    left, top, width, height = (float(value) for value in box)
    if not (width > 0 and height > 0 and math.isfinite(left + top + width + height)):
        raise ValueError(f"its box is {box}; it needs left, top, and a width and height above 0")
    return {"box": [left, top, width, height]}, width * height


def _area(polygon: Sequence[float]) -> float:
    x, y = np.array(polygon[::2]), np.array(polygon[1::2])
    return float(abs((x * np.roll(y, -1) - y * np.roll(x, -1)).sum()) / 2)


def _outlines(image: dict[str, Any], marks: list[dict[str, Any]]) -> dict[str, Any]:
    """width and height may be missing: then the image's own are not checked."""
    return {
        "size": [image.get("height"), image.get("width")],
        "shapes": [mark["shape"] for mark in marks],
    }


def draw_outlines(outlines: dict[str, Any], height: int, width: int) -> np.ndarray:
    """bool [height, width], true in any of the shapes. ValueError for shapes of an image of another size."""
    stated = outlines["size"]
    if None not in stated and tuple(stated) != (height, width):
        raise ValueError(f"is annotated as {stated[1]}x{stated[0]}, but is {width}x{height}")
    image = Image.new("1", (width, height))
    draw, mask = ImageDraw.Draw(image), np.zeros((height, width), dtype=bool)
    for shape in outlines["shapes"]:
        if "rle" in shape:
            if tuple(shape["size"]) != (height, width):
                raise ValueError(f"has an RLE of {shape['size'][1]}x{shape['size'][0]}, but is {width}x{height}")
            values = np.repeat(np.arange(len(shape["rle"])) % 2 == 1, shape["rle"])
            mask |= values.reshape(width, height).T  # column by column
        elif "box" in shape:
            left, top, across, down = shape["box"]
            mask[
                max(0, math.floor(top)) : math.ceil(top + down), max(0, math.floor(left)) : math.ceil(left + across)
            ] = True
        else:
            for polygon in shape["polygons"]:
                # COCO counts from the corner of a pixel, Pillow from its middle.
                draw.polygon([value - 0.5 for value in polygon], fill=1)
    return mask | np.asarray(image)
