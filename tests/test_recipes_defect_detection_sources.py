"""Where images come from: folders, tables, COCO files, data sets; what is wrong with them is named file by file."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dist_train.errors import ConfigError, DataError
from recipes.defect_detection.config import DataConfig
from recipes.defect_detection.listing import NO_SPLIT, TEST, TRAIN, VALIDATION, Listing
from recipes.defect_detection.sources import find_listing
from tests.pictures import prepare_images, write_classes, write_image, write_mask, write_table


def _list(path: Path | str, **data: Any) -> Listing:
    return find_listing(DataConfig(path=str(path), **data))


def _refusal(path: Path | str, kind: type[Exception] = DataError, **data: Any) -> str:
    with pytest.raises(kind) as raised:
        prepare_images(Path(str(path)).parent / "cache", path=path, **data)
    return str(raised.value)


def test_a_folder_is_a_class_and_what_is_no_image_is_named(tmp_path: Path) -> None:
    write_classes(tmp_path, {"good": 2, "scratch": 2})
    (tmp_path / "LICENSE").write_text("free")
    (tmp_path / "scratch" / "notes.txt").write_text("?")
    (tmp_path / "scratch" / ".hidden.png").write_text("?")
    (tmp_path / "scratch" / "deep").mkdir()
    write_image(tmp_path / "scratch" / "deep" / "c.JPEG", 9, format="JPEG")
    listing = _list(tmp_path)
    assert [(row.id, row.label, row.split) for row in listing.rows] == [
        ("good/000.png", "good", NO_SPLIT),
        ("good/001.png", "good", NO_SPLIT),
        ("scratch/000.png", "scratch", NO_SPLIT),
        ("scratch/001.png", "scratch", NO_SPLIT),
        ("scratch/deep/c.JPEG", "scratch", NO_SPLIT),
    ]
    assert listing.warnings == ["left out as no images by their endings: 1 file, scratch/notes.txt"]
    assert listing.problems == []


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    write_classes(tmp_path / "store", {"x": 2})
    write_classes(tmp_path / "parts", {"good": 1})
    (tmp_path / "parts" / "scratch").symlink_to(tmp_path / "store" / "x")
    (tmp_path / "parts" / "scratch" / "round").symlink_to(tmp_path / "parts")
    assert [row.id for row in _list(tmp_path / "parts").rows] == [
        "good/000.png",
        "scratch/000.png",
        "scratch/001.png",
    ]


def test_folders_named_like_splits_are_the_split(tmp_path: Path) -> None:
    for index, name in enumerate(("train", "val", "test")):
        write_classes(tmp_path / name, {"ok": 1, "dent": 1}, 10 * index)
    listing = _list(tmp_path)
    assert [(row.label, row.split) for row in listing.rows] == [
        ("dent", TEST), ("ok", TEST), ("dent", TRAIN), ("ok", TRAIN), ("dent", VALIDATION), ("ok", VALIDATION)
    ]  # fmt: skip
    with pytest.raises(ConfigError, match=r"data\.folds is 3, but .* is split already"):
        _list(tmp_path, folds=3)


def test_masks_below_the_images_are_named_or_refused(tmp_path: Path) -> None:
    """The layout of MVTec AD: train and test, with ground_truth beside them, masks called NAME_mask.png."""
    write_classes(tmp_path / "train", {"good": 2})
    write_classes(tmp_path / "test", {"good": 1, "cut": 1}, 5)
    write_mask(tmp_path / "ground_truth" / "cut" / "000_mask.png", [(2, 2, 6, 6)])
    assert "ground_truth" in _refusal(tmp_path, ConfigError)
    listing = _list(tmp_path, mask_path=str(tmp_path / "ground_truth"))
    assert [(row.id, row.split, bool(row.mask)) for row in listing.rows] == [
        ("test/cut/000.png", TEST, True),
        ("test/good/000.png", TEST, False),
        ("train/good/000.png", TRAIN, False),
        ("train/good/001.png", TRAIN, False),
    ]
    assert listing.problems == []


def test_images_outside_of_classes_are_refused(tmp_path: Path) -> None:
    write_image(tmp_path / "flat" / "a.png", 0)
    assert "lie in no folders" in _refusal(tmp_path / "flat")
    (tmp_path / "empty").mkdir()
    assert "a folder without images below" in _refusal(tmp_path / "empty")
    write_classes(tmp_path / "flat", {"good": 3})
    assert "a.png: lies in no folder of a class" in _refusal(tmp_path / "flat")
    assert "no such file" in _refusal(tmp_path / "absent")
    (tmp_path / "a.txt").write_text("?")
    assert "neither a folder of images nor a table" in _refusal(tmp_path / "a.txt")


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_every_kind_of_table_gives_the_same_rows(tmp_path: Path, kind: str) -> None:
    rows: list[dict[str, Any]] = []
    for index in range(4):
        write_image(tmp_path / "images" / f"{index}.png", index)
        side, label = ("train", "validation", "test", "train")[index], "ok" if index else "dent"
        row = {"name": f"images/{index}.png", "class": label, "part": f"p{index // 2}", "side": side}
        rows.append(row | {"mask": "" if index else "m.png"})
    write_mask(tmp_path / "m.png", [(0, 0, 3, 3)])
    file = tmp_path / f"parts.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    elif kind == "jsonl":
        file.write_text("\n".join(json.dumps(row) for row in rows))
    else:
        signs = "\t" if kind == "tsv" else ","
        lines = [list(rows[0]), *(row.values() for row in rows)]
        lines = [list(rows[0]), *(row.values() for row in rows)]
        file.write_text("\n".join(signs.join(line) for line in lines))
    listing = _list(
        file, file_column="name", label_column="class", item_column="part", mask_column="mask", split_column="side"
    )
    assert [(row.id, row.label, row.item, row.split) for row in listing.rows] == [
        ("images/0.png", "dent", "p0", TRAIN),
        ("images/1.png", "ok", "p0", VALIDATION),
        ("images/2.png", "ok", "p1", TEST),
        ("images/3.png", "ok", "p1", TRAIN),
    ]
    assert [os.path.basename(row.mask) for row in listing.rows] == ["m.png", "", "", ""]
    assert listing.problems == []


def test_all_that_is_wrong_with_a_table_and_its_images_is_named_at_once(tmp_path: Path) -> None:
    for index in range(8):
        write_image(tmp_path / f"{index}.png", index)
    (tmp_path / "6.png").write_bytes(b"")
    rows = [{"file": f"{index}.png", "label": "0.5", "mask": "", "side": "train"} for index in range(8)]
    rows[1]["label"] = "1.5"
    rows[2]["label"] = ""
    rows[3]["file"] = "0.png"
    rows[4]["mask"] = "gone.png"
    rows[5]["side"] = "someday"
    rows[7]["label"] = "likely"
    rows += [{"file": "gone.png", "label": "0", "mask": "", "side": "test"}, {**rows[0], "file": " "}]
    said = _refusal(
        write_table(tmp_path / "t.csv", rows), labels_are="probabilities", mask_column="mask", split_column="side"
    )
    for expected in (
        "9 problems",
        "t.csv: row 2 has the label '1.5'; allowed are probabilities from 0 to 1",
        "t.csv: row 3 has no label in 'label'",
        "t.csv: row 4 names 0.png, as row 1 does",
        r"t.csv: row 5 names a mask, but there is no such file .*/gone.png",
        "t.csv: row 6 has the split 'someday'",
        "t.csv: row 8 has the label 'likely'",
        "t.csv: row 9 names gone.png, but there is no such file",
        "t.csv: row 10 names no file in 'file'",
        r"6.png: is empty \(0 bytes\)",
        r"data.most_unreadable \(0\) is how many",
    ):
        assert re.search(expected, said), f"{expected}\n{said}"


def test_the_first_twenty_problems_are_shown_and_all_are_counted(tmp_path: Path) -> None:
    rows = [{"file": f"{index}.png", "label": "ok"} for index in range(50)]
    said = _refusal(write_table(tmp_path / "t.csv", rows))
    assert "51 problems" in said, "the last says that none is there"
    assert said.count("there is no such file") == 20
    assert "and 31 more" in said


def test_keys_that_do_not_go_with_a_source_are_refused(tmp_path: Path) -> None:
    write_classes(tmp_path / "parts", {"good": 3, "bad": 3})
    for key, value in (("item_column", "part"), ("mask_column", "m"), ("split_column", "s")):
        said = _refusal(tmp_path / "parts", ConfigError, **{key: value})
        assert f"data.{key} is {value}, which does not go with a folder of images" in said
    assert "parts has none of" in _refusal(tmp_path / "parts", ConfigError, labels_are="probabilities")
    with pytest.raises(ConfigError, match=r"data\.path is not set"):
        find_listing(DataConfig())


def test_the_part_is_found_in_the_names(tmp_path: Path) -> None:
    for name in ("p1_a.png", "p1_b.png", "p22_a.png", "other.png"):
        write_image(tmp_path / "good" / name, len(name))
    listing = _list(tmp_path, item_pattern=r"^(p\d+)_")
    assert [row.item for row in listing.rows] == ["good/other.png", "p1", "p1", "p22"]
    assert listing.warnings == [
        "data.item_pattern fits the names of all but 1 image, good/other.png: each of these is its own part"
    ]
    with pytest.raises(ConfigError, match=r"fits the name of no image, for example not good/other\.png"):
        _list(tmp_path, item_pattern=r"(x\d)")


def test_masks_without_images_and_of_other_sizes_are_named(tmp_path: Path) -> None:
    write_classes(tmp_path / "images", {"good": 4, "dent": 4})
    for index in range(2):
        write_mask(tmp_path / "masks" / "dent" / f"00{index}.bmp", [(0, 0, 9, 9)], height=24 - 4 * index)
    write_mask(tmp_path / "masks" / "dent" / "99.png", [(0, 0, 9, 9)])
    (tmp_path / "masks" / "dent" / "002.png").write_bytes(b"?")
    said = _refusal(tmp_path / "images", mask_path=tmp_path / "masks")
    assert "3 problems" in said
    assert re.search(r"masks/dent/99\.png: a mask without an image", said)
    assert re.search(r"masks/dent/001\.bmp: is a mask of 24x20, but its image is 24x24", said)
    assert re.search(r"masks/dent/002\.png: is no image of a known format", said)
    assert "most_unreadable" not in said, "a mask is no image that may be left out"
    assert "no such folder" in _refusal(tmp_path / "images", mask_path=tmp_path / "nothing")


def _coco(folder: Path, **changes: Any) -> Path:
    for index in range(5):
        write_image(folder / "images" / f"{index}.png", index, height=20, width=30)
    runs = [45, 5, 15, 5, 530]  # columns of 20: rows 5 … 9 of the third and the fourth
    annotations = [
        {"id": 1, "image_id": 10, "category_id": 7, "bbox": [2, 3, 4, 5]},
        {"id": 2, "image_id": 11, "category_id": 8, "segmentation": [[0, 0, 10, 0, 10, 10, 0, 10]]},
        {"id": 3, "image_id": 11, "category_id": 7, "bbox": [20, 10, 2, 2], "segmentation": []},
        {"id": 4, "image_id": 12, "category_id": 7, "segmentation": {"counts": runs, "size": [20, 30]}},
    ]
    content = {
        "images": [{"id": 10 + i, "file_name": f"{i}.png", "height": 20, "width": 30} for i in range(5)],
        "annotations": annotations,
        "categories": [{"id": 7, "name": "dent"}, {"id": 8, "name": "scratch"}],
    }
    path = folder / "annotations.json"
    path.write_text(json.dumps(content | changes))
    return path


def test_coco_boxes_outlines_and_runs_become_masks_and_images_without_are_good(tmp_path: Path) -> None:
    path = _coco(tmp_path)
    listing = _list(path)
    assert [row.label for row in listing.rows] == ["dent", "scratch", "dent", "good", "good"]
    assert listing.warnings == ["defects of several kinds, filed under the largest: 1 image, 1.png"]
    stored, facts = _prepared_coco(tmp_path, path)
    masks = [stored.mask(index) for index in range(5)]
    box = np.zeros((20, 30), dtype=bool)
    box[3:8, 2:6] = True
    assert (masks[0] == box).all()
    outlined = np.zeros((20, 30), dtype=bool)
    outlined[:10, :10] = True
    outlined[10:12, 20:22] = True
    assert (masks[1] == outlined).all()
    runs = np.zeros((20, 30), dtype=bool)
    runs[5:10, 2:4] = True
    assert (masks[2] == runs).all()
    assert masks[3] is None
    assert facts["has_masks"]
    assert stored.table["smallest_px"].to_pylist() == [20, 4, 10] + [-1] * 9


def _prepared_coco(tmp_path: Path, path: Path) -> Any:
    # Five images are too few to be split.
    content = json.loads(path.read_text())
    for index in range(5, 12):
        write_image(tmp_path / "images" / f"{index}.png", index, height=20, width=30)
        content["images"].append({"id": 10 + index, "file_name": f"{index}.png"})
    path.write_text(json.dumps(content))
    return prepare_images(tmp_path / "cache", path=path, size_px=[20, 30])


def test_what_is_wrong_with_coco_annotations_is_named(tmp_path: Path) -> None:
    path = _coco(tmp_path)
    content = json.loads(path.read_text())
    content["annotations"] += [
        {"id": 5, "image_id": 99, "category_id": 7, "bbox": [0, 0, 1, 1]},
        {"id": 6, "image_id": 10, "category_id": 3, "bbox": [0, 0, 1, 1]},
        {"id": 7, "image_id": 10, "category_id": 7, "bbox": [0, 0, 0, 1]},
        {"id": 8, "image_id": 10, "category_id": 7, "segmentation": {"counts": "abc", "size": [20, 30]}},
        {"id": 9, "image_id": 10, "category_id": 7, "segmentation": {"counts": [5, 5], "size": [20, 30]}},
        {"id": 10, "image_id": 10, "category_id": 7, "segmentation": [[1, 2, 3, 4]]},
    ]
    content["images"][0]["width"] = 31
    content["images"] += [{"id": 50, "file_name": "gone.png"}, {"id": 51, "file_name": "1.png"}]
    path.write_text(json.dumps(content))
    said = _refusal(path)
    for expected in (
        "9 problems",
        "the annotation 6 has the category 3, which is not listed",
        r"the annotation 7 of the image 10: its box is \[0, 0, 0, 1\]",
        "the annotation 8 of the image 10: its RLE is compressed",
        "the annotation 9 of the image 10: its RLE has 10 pixels",
        "the annotation 10 of the image 10: a polygon needs at least three points",
        "gone.png, but there is no such file",
        "1.png is listed twice",
        r"annotation\(s\) of the image 99, which is not listed",
        r"0\.png: is annotated as 31x20, but is 30x20",
    ):
        assert re.search(expected, said), f"{expected}\n{said}"
    for text in ("[]", "{}", "no JSON", '{"images": [], "annotations": [], "categories": []}'):
        path.write_text(text)
        assert re.search("no COCO file|no JSON|lists no images", _refusal(path))


@pytest.fixture(scope="module")
def image_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import datasets

    folder = tmp_path_factory.mktemp("sets")
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["good", "dent"]),
            "part": datasets.Value("int64"),
            "outline": datasets.Image(),
        }
    )

    def rows(count: int, first: int) -> dict[str, list[Any]]:
        files = [str(write_image(folder / "files" / f"{first + index}.png", first + index)) for index in range(count)]
        mask = str(write_mask(folder / "files" / "mask.png", [(1, 1, 5, 5)]))
        labels = [index % 2 for index in range(count)]
        return {"image": files, "label": labels, "part": [index // 2 for index in range(count)],
                "outline": [mask if label else None for label in labels]}  # fmt: skip

    alone = datasets.Dataset.from_dict(rows(12, 0), features=features)
    alone.save_to_disk(folder / "alone")
    both = {"train": alone, "test": datasets.Dataset.from_dict(rows(6, 100), features=features)}
    datasets.DatasetDict(both).save_to_disk(folder / "split")
    return folder


def test_a_saved_image_set_is_read_with_class_names_and_masks(image_set: Path, tmp_path: Path) -> None:
    stored, facts = prepare_images(tmp_path, path=image_set / "alone", mask_column="outline")
    assert facts["splits"]["train"]["labels"].keys() == {"good", "defective"}
    assert stored.table["type"].to_pylist() == ["", "dent"] * 6
    for index in range(12):
        expected = np.asarray(Image.open(image_set / "files" / f"{index}.png"))
        assert (stored.image(index)[0] == expected).all()
    marked = stored.mask(1)
    assert marked is not None
    assert marked.sum() == 16
    assert stored.mask(0) is None
    listing = _list(image_set / "alone", item_column="part", mask_column="outline")
    assert [row.item for row in listing.rows][:4] == ["0", "0", "1", "1"]


def test_other_columns_of_an_image_set_are_other_images(image_set: Path, tmp_path: Path) -> None:
    first, _ = prepare_images(tmp_path, path=image_set / "alone", file_column="image")
    second, _ = prepare_images(tmp_path, path=image_set / "alone", file_column="image", mask_column="outline")
    assert first.mask(1) is None
    assert second.mask(1) is not None
    assert len(list(tmp_path.glob("images-*"))) == 2


def test_the_splits_of_an_image_set_are_the_split(image_set: Path, tmp_path: Path) -> None:
    stored, facts = prepare_images(tmp_path, path=image_set / "split", file_column="image")
    assert len(stored.rows("test")) == 6
    assert facts["split"]["method"] == "given, validation out of its training images"
    last = stored.rows("test")[-1]
    assert (stored.image(int(last))[0] == np.asarray(Image.open(image_set / "files" / "105.png"))).all()


def test_an_image_set_whose_columns_are_not_told_apart_is_refused(image_set: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has 2 columns of images: image, outline; .* data\.file_column"):
        prepare_images(tmp_path, path=image_set / "alone")
    prepare_images(tmp_path, path=image_set / "alone", file_column="image")
    with pytest.raises(DataError, match="has no column 'kind'"):
        prepare_images(tmp_path, path=image_set / "alone", file_column="image", label_column="kind")
