"""From images to a prepared folder: no part on both sides, pixels kept by content, whole or not at all."""

from __future__ import annotations

import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from dist_train import worker_pool
from dist_train.errors import DataError
from recipes.defect_detection import data as prepared_data
from recipes.defect_detection import file_hashes
from recipes.defect_detection.images import Format, fit_mask
from recipes.defect_detection.stored import Damaged, StoredImages
from tests.pictures import pixels, prepare_images, write_classes, write_image, write_mask, write_table

ABOVE = [folder / "shared" / "data" for folder in Path(__file__).parents]
SHARED = next((folder for folder in ABOVE if folder.is_dir()), ABOVE[2])
REAL = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the public image sets in ../shared/data")
SPLITS = ("train", "validation", "test")


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    return write_classes(tmp_path / "parts", {"good": 20, "dent": 8})


def _settle(folder: Path) -> None:
    """Make files look as if they were written a while ago: those of this moment are not remembered by their time."""
    for path in folder.rglob("*"):
        os.utime(path, (1_600_000_000, 1_600_000_000))


def test_a_folder_is_prepared_as_described(parts: Path, tmp_path: Path) -> None:
    for index in range(8):
        write_mask(tmp_path / "masks" / "dent" / f"{index:03d}.png", [(2, 2, 5, 5 + index)])
    stored, facts = prepare_images(tmp_path / "cache", path=parts, mask_path=tmp_path / "masks")
    assert facts["labels"] == ["good", "defective"]
    assert facts["good"] == "good"
    assert facts["types"] == ["dent"]
    assert facts["size"] == [24, 24]
    assert [facts["splits"][name]["rows"] for name in SPLITS] == [len(stored.rows(name)) for name in SPLITS]
    assert facts["splits"]["train"]["labels"] == {"good": 12, "defective": 5}
    table = stored.table.to_pylist()
    for index, row in enumerate(table):
        assert row["row"] == index
        expected = np.asarray(Image.open(parts / row["id"]))
        assert (stored.image(index)[0] == expected).all()
        assert row["file"] == str(parts / row["id"])
        dented = row["id"].startswith("dent")
        assert (row["label"], row["type"]) == ((1, "dent") if dented else (0, ""))
        assert row["target"] == ([0, 1] if dented else [1, 0])
        mask = stored.mask(index)
        assert (mask is not None) == dented
        assert row["defect_px"] == row["smallest_px"] == (-1 if mask is None else mask.sum())
    train = np.stack([stored.image(int(row)) for row in stored.rows("train")]) / 255
    assert facts["mean"] == pytest.approx([train.mean()])
    assert facts["std"] == pytest.approx([train.std()])
    assert (stored.targets[stored.labels == 1] == [0, 1]).all()
    lengths = prepared_data.lengths(stored._folder)
    assert lengths.tolist() == [576] * 17
    assert lengths.dtype == np.int64


def test_weights_go_on_with_the_same_classes_and_channels() -> None:
    facts = {"labels": ["good", "defective"], "channels": 1}
    assert prepared_data.misfit(facts, facts) is None
    assert "classes" in str(prepared_data.misfit(facts, facts | {"labels": ["a", "b"]}))
    assert "3 channels instead of 1" in str(prepared_data.misfit(facts, facts | {"channels": 3}))


def test_no_part_and_no_copy_lies_on_both_sides(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    rows = []
    for index in range(120):
        name = f"{index:03d}.png"
        source = index
        if index % 10 == 9:  # the same bytes, the same pixels in another file, or neither
            source = int(generator.integers(0, index))
        write_image(tmp_path / name, source)
        if index % 20 == 19:
            name = f"{index:03d}.bmp"
            write_image(tmp_path / name, source)
        rows.append({"file": name, "label": ["ok", "dent", "scratch"][source % 3], "part": index // 3})
    stored, facts = prepare_images(tmp_path / "cache", path=write_table(tmp_path / "t.csv", rows), item_column="part")
    sides: dict[Any, set[int]] = {}
    for index, row in enumerate(stored.table.to_pylist()):
        for key in (("part", row["item"]), ("pixels", stored.image(index).tobytes())):
            sides.setdefault(key, set()).add(row["split"])
    assert all(len(found) == 1 for found in sides.values())
    assert facts["leaks"]["exact_duplicates"] >= 20
    assert facts["leaks"]["items_crossing"] == facts["leaks"]["duplicates_crossing"] == 0
    assert facts["items"] == 40


def test_copies_with_different_labels_are_told(tmp_path: Path) -> None:
    parts = write_classes(tmp_path / "parts", {"good": 9, "dent": 9})
    shutil.copy(parts / "good" / "000.png", parts / "dent" / "000.png")
    _, facts = prepare_images(tmp_path / "cache", path=parts)
    assert facts["warnings"] == ["1 group(s) of identical images have different labels"]


def test_a_given_split_is_respected_and_what_crosses_it_is_told(tmp_path: Path) -> None:
    for index, name in enumerate(("train", "validation", "test")):
        write_classes(tmp_path / "parts" / name, {"good": 4, "dent": 2}, 10 * index)
    shutil.copy(tmp_path / "parts" / "train" / "good" / "000.png", tmp_path / "parts" / "test" / "good" / "000.png")
    stored, facts = prepare_images(tmp_path / "cache", path=tmp_path / "parts")
    for row in stored.table.to_pylist():
        assert SPLITS[row["split"]] == row["id"].split("/")[0]
    assert facts["split"]["method"] == "given"
    assert facts["leaks"]["duplicates_crossing"] == 1
    assert "1 group(s) of identical images lie in several splits" in facts["warnings"][0]


def test_other_folds_and_labels_read_no_image_again(parts: Path, tmp_path: Path) -> None:
    _settle(parts)
    tested: list[str] = []
    for fold in range(4):
        said: list[str] = []
        stored, facts = prepare_images(tmp_path / "cache", said, path=parts, folds=4, fold=fold)
        assert facts["split"]["method"] == f"fold {fold} of 4"
        tested += [stored.table["id"][int(row)].as_py() for row in stored.rows("test")]
        assert facts["splits"]["test"]["labels"] == {"good": 5, "defective": 2}
        assert any("images read before" in line for line in said) == (fold > 0)
        # From now on every image holds something else, of the same size and time.
        for path in parts.rglob("*.png"):
            path.write_bytes(b"x" * path.stat().st_size)
        _settle(parts)
    assert len(tested) == len(set(tested)) == 28
    prepare_images(tmp_path / "cache", path=parts, target="classes")
    assert len(list((tmp_path / "cache").glob("images-*"))) == 1


def test_a_second_start_reads_no_image(parts: Path, tmp_path: Path) -> None:
    _settle(parts)
    first, _ = prepare_images(tmp_path / "cache", path=parts)
    changed = parts / "good" / "003.png"
    changed.write_bytes(b"x" * changed.stat().st_size)
    _settle(parts)
    file_hashes._known.clear()  # as in a new process
    again, _ = prepare_images(tmp_path / "cache", path=parts)
    assert again._folder == first._folder
    os.utime(changed)
    with pytest.raises(DataError, match=r"003\.png: is no image"):
        prepare_images(tmp_path / "cache", path=parts)
    moved = tmp_path / "elsewhere"
    shutil.copytree(parts, moved)
    write_image(moved / "good" / "003.png", 3)
    elsewhere, _ = prepare_images(tmp_path / "cache", path=moved)
    assert elsewhere._folder == first._folder, "content counts, not the place"


def test_a_file_that_changes_within_the_clock_s_tick_is_read_again(parts: Path, tmp_path: Path) -> None:
    first, _ = prepare_images(tmp_path / "cache", path=parts)
    memo = next((tmp_path / "cache" / "hashes").glob("*.json"), None)
    assert memo is None, "these files are too young to be remembered"
    write_image(parts / "good" / "003.png", 999)
    again, _ = prepare_images(tmp_path / "cache", path=parts)
    assert again._folder != first._folder


def test_workers_give_the_same_bytes_as_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = write_classes(tmp_path / "parts", {"good": 70, "dent": 10})
    for index in range(0, 10, 2):
        write_mask(tmp_path / "masks" / "dent" / f"{index:03d}.png", [(2, 2, 5, 5 + index)])
    (parts / "good" / "007.png").write_bytes(b"")
    monkeypatch.setattr(worker_pool, "_ALONE_S", 0.0)
    folders = []
    for cores in ({0}, {0, 1}):
        monkeypatch.setattr(worker_pool.os, "sched_getaffinity", lambda pid, cores=cores: cores)
        cache = tmp_path / f"cache{len(cores)}"
        prepare_images(cache, path=parts, mask_path=tmp_path / "masks", most_unreadable=1)
        folders += [next(cache.glob("images-*")), next(cache.glob("defect_detection-*"))]
    for first, second in ((folders[0], folders[2]), (folders[1], folders[3])):
        names = sorted(path.name for path in first.iterdir())
        assert "images.npy" in names
        for name in names:
            assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_what_is_killed_leaves_no_half_cache(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    code = (
        "from pathlib import Path\nfrom tests.pictures import prepare_images\n"
        f"prepare_images(Path({str(cache)!r}), path='synthetic', images=600, size_px=64)"
    )
    root = Path(__file__).parent.parent
    with subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(root)}) as process:
        deadline = time.monotonic() + 60
        while not list(cache.glob(".tmp-images-*/images.npy")) and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.2)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    left = [path.name for path in cache.iterdir()]
    assert any(name.startswith(".tmp-images-") for name in left)
    assert not [name for name in left if not name.startswith(".")]
    left_over = next(cache.glob(".tmp-images-*"))
    (left_over / "marker").touch()
    (cache / ".tmp-images-another").mkdir()
    stored, _ = prepare_images(cache, path="synthetic", images=600, size_px=64)
    assert len(stored) == 600
    for index in range(0, 600, 50):
        assert stored.image(index).any()
    names = {path.name for folder in cache.glob("[!.]*") for path in folder.iterdir()}
    assert "marker" not in names, "the same preparation begins anew"
    assert not list(cache.glob(".tmp-*")), "nor does anything stay of another one that was killed"


def test_unreadable_images_within_the_budget_are_left_out_and_named(parts: Path, tmp_path: Path) -> None:
    (parts / "good" / "004.png").write_bytes(b"")
    data = (parts / "dent" / "001.png").read_bytes()
    (parts / "dent" / "001.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(
        DataError, match=r"(?s)2 problems.*001\.png: is damaged.*004\.png: is empty.*most_unreadable \(1"
    ):
        prepare_images(tmp_path / "cache", path=parts, most_unreadable=1)
    for path in write_masks_of(tmp_path / "masks", parts):
        assert path.is_file()
    stored, facts = prepare_images(tmp_path / "cache", path=parts, most_unreadable=2, mask_path=tmp_path / "masks")
    assert len(stored) == facts["rows"] == 26
    assert [Path(line.split(": ")[0]).name for line in facts["unreadable"]] == ["001.png", "004.png"]
    assert sum("left out, as data.most_unreadable allows" in warning for warning in facts["warnings"]) == 2
    for index, row in enumerate(stored.table.to_pylist()):
        assert (stored.image(index)[0] == np.asarray(Image.open(parts / row["id"]))).all()
        mask = stored.mask(index)
        if row["type"]:
            assert mask is not None
            assert mask.sum() == 4 * (1 + int(row["id"][5:8]))
    with pytest.raises(DataError, match="2 problems"):
        prepare_images(tmp_path / "cache", path=parts, most_unreadable=1, mask_path=tmp_path / "masks")


def write_masks_of(folder: Path, parts: Path) -> list[Path]:
    """A mask of another size for each dent."""
    return [
        write_mask(folder / "dent" / path.name, [(0, 0, 4, 1 + int(path.stem))]) for path in (parts / "dent").iterdir()
    ]


def test_a_damaged_image_is_noticed_when_it_is_taken(parts: Path, tmp_path: Path) -> None:
    stored, _ = prepare_images(tmp_path / "cache", path=parts)
    images = np.lib.format.open_memmap(stored._folder / "images.npy", "r+")
    images[3, 0, 5, 5] ^= 1
    images.flush()
    stored = StoredImages(stored._folder)
    with pytest.raises(Damaged, match=r"image dent/003\.png \(row 3 of"):
        stored.image(3)
    assert stored.image(2).shape == (1, 24, 24)
    with pytest.raises(ValueError, match="read-only"):
        stored.image(2)[:] = 0


def test_deep_grey_images_are_scaled_by_the_bits_that_they_share(tmp_path: Path) -> None:
    parts = write_classes(tmp_path / "parts", {"good": 6, "dent": 3})
    for index in range(12):
        name = tmp_path / "parts" / ("good" if index % 2 else "dent") / f"deep{index}.png"
        Image.fromarray(pixels(index).astype(np.uint16) * 16 // (1 + index % 3)).save(name)
    said: list[str] = []
    stored, facts = prepare_images(tmp_path / "cache", said, path=parts)
    assert facts["bits"] == 12
    assert any("12 images are of 16 bits and use 12 bits" in line for line in said)
    assert facts["conversions"] == {"16-bit pixels scaled to 8 bits": 12}
    for index, row in enumerate(stored.table.to_pylist()):
        read = np.asarray(Image.open(parts / row["id"])).astype(float)
        read = read / 4095 * 255 if "deep" in row["id"] else read
        assert np.abs(stored.image(index)[0] - read).max() <= 0.5


def test_masks_and_labels_that_contradict_are_told(parts: Path, tmp_path: Path) -> None:
    write_mask(tmp_path / "masks" / "good" / "001.png", [(0, 0, 3, 3)])
    write_mask(tmp_path / "masks" / "dent" / "001.png", [])
    _, facts = prepare_images(tmp_path / "cache", path=parts, mask_path=tmp_path / "masks")
    assert facts["warnings"] == [
        "labelled good, but a defect is marked in 1 image, good/001.png",
        "labelled defective, but the mask is empty of 1 image, dent/001.png",
        "labelled defective, but no mask goes with 7 images, the first dent/000.png",
    ]


def test_mixed_sizes_are_fine_and_changed_proportions_are_told(parts: Path, tmp_path: Path) -> None:
    write_image(parts / "good" / "wide.png", 77, 24, 96)
    _, facts = prepare_images(tmp_path / "cache", path=parts)
    assert facts["warnings"] == []
    _, facts = prepare_images(tmp_path / "cache", path=parts, fit="stretch")
    assert "data.fit=stretch changes the proportions by more than 1.5 in 1 image, good/wide.png" in facts["warnings"][0]


def test_the_size_is_told_before_anything_is_built(parts: Path, tmp_path: Path) -> None:
    said: list[str] = []
    prepare_images(tmp_path / "cache", said, path=parts)
    told = next(index for index, line in enumerate(said) if "takes about" in line)
    assert told < next(index for index, line in enumerate(said) if "images read" in line)


def test_generated_images_are_prepared_with_their_masks(tmp_path: Path) -> None:
    given = {"path": "synthetic", "images": 200, "size_px": 32, "synthetic": {"defective_share": 0.2}}
    stored, facts = prepare_images(tmp_path, **given)
    assert facts["labels"] == ["good", "defective"]
    assert facts["types"] == ["scratch"]
    defective = np.flatnonzero(stored.labels)
    assert 20 < len(defective) < 60
    for index in range(200):
        mask = stored.mask(index)
        assert (mask is not None) == (index in defective)
        if mask is not None:
            assert mask.sum() == stored.table["defect_px"][index].as_py() > 0
            parts, _ = ndimage.label(mask, structure=np.ones((3, 3)))
            assert np.bincount(parts.ravel())[1:].min() == stored.table["smallest_px"][index].as_py()
    colour, _ = prepare_images(tmp_path, **given, channels=3)
    assert (colour.image(3) == stored.image(3)).all()
    assert colour.image(3).shape == (3, 32, 32)


def test_memory_stays_flat_while_images_are_read(tmp_path: Path) -> None:
    parts = write_classes(tmp_path / "parts", {"good": 350, "dent": 50})
    code = (
        "import os, re, threading\nfrom pathlib import Path\nfrom tests.pictures import prepare_images\n"
        "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"  # all of it is done in this process
        "def held(): return int(re.search(r'RssAnon:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])\n"
        f"cache, parts = Path({str(tmp_path / 'cache')!r}), {str(parts)!r}\n"
        "def go(size): prepare_images(cache, path=parts, fit='stretch', size_px=size)\n"
        "go(16); before, most, stop = held(), [0], threading.Event()\n"
        "def watch():\n    while not stop.wait(0.005): most[0] = max(most[0], held())\n"
        "thread = threading.Thread(target=watch); thread.start(); go(320); stop.set(); thread.join()\n"
        "print(most[0] - before)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    pixels_kib = 400 * 320 * 320 / 1024
    assert 0 < int(done.stdout) < pixels_kib / 4, f"{done.stdout} KiB for {pixels_kib} KiB of pixels"


@REAL
def test_copies_in_the_steel_images_stay_together(tmp_path: Path) -> None:
    _, facts = prepare_images(tmp_path, path=SHARED / "xsdd", target="classes", size_px=32)
    assert facts["rows"] == 1360
    assert facts["good"] is None
    assert facts["leaks"]["exact_duplicates"] == 18
    assert facts["leaks"]["duplicates_crossing"] == 0


@REAL
def test_the_exposures_of_a_magnetic_tile_lie_in_one_split(tmp_path: Path) -> None:
    """Six exposures of a tile have running numbers: exp1_num_32128, exp2_num_32153, exp3_num_32171, …"""
    stored, facts = prepare_images(
        tmp_path,
        path=SHARED / "magnetic_tile" / "images",
        mask_path=SHARED / "magnetic_tile" / "masks",
        item_pattern=r"num_(\d*?)\d{1,4}\.",
        size_px=64,
    )
    numbers = np.array([int(re.search(r"num_(\d+)", name)[1]) for name in stored.table["id"].to_pylist()])  # type: ignore[index]
    splits = stored.table["split"].to_numpy()[np.argsort(numbers)]
    close = np.diff(np.sort(numbers)) < 200
    assert (splits[1:] == splits[:-1])[close].all()
    assert facts["items"] == 32
    assert facts["good"] == "free"
    for row in np.flatnonzero(stored.table["mask"].to_numpy() >= 0)[:20].tolist():
        path = SHARED / "magnetic_tile" / "masks" / Path(stored.table["id"][row].as_py()).with_suffix(".png")
        assert (stored.mask(row) == fit_mask(np.asarray(Image.open(path)), Format(64, 64, 1, "pad"))).all()


@REAL
def test_the_solar_cells_keep_their_soft_labels(tmp_path: Path) -> None:
    with open(SHARED / "elpv" / "labels.csv", newline="") as stream:
        rows = [row | {"file": str(SHARED / "elpv" / row["file"])} for row in csv.DictReader(stream)][::8]
    given = {"label_column": "defect_probability", "labels_are": "probabilities", "size_px": 32}
    stored, facts = prepare_images(tmp_path / "cache", path=write_table(tmp_path / "cells.csv", rows), **given)
    assert facts["rows"] == 328
    assert sorted({round(value, 4) for value in stored.targets[:, 1].tolist()}) == [0, 0.3333, 0.6667, 1]
    assert stored.labels.mean() == pytest.approx(0.31, abs=0.05)
