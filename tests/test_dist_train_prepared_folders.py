"""Prepared data is built once, and a prepared folder exists whole or not at all."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from dist_train import prepared
from dist_train.errors import DataError, StorageError
from tests.front_door import mounted


def _recipe(tmp_path: Path, content: str = "one", build: Any = None) -> tuple[Any, Any, list[str]]:
    """A recipe whose data is one word, and what its `build` has done."""
    built: list[str] = []

    def write(config: Any, folder: Path, say: Any) -> dict[str, Any]:
        built.append(content)
        prepared.write_split(folder, "train", pa.table({"word": [content]}))
        return {"splits": {"train": {"rows": 1}}}

    data = SimpleNamespace(describe=lambda config: {"content": content}, build=build or write)
    config = SimpleNamespace(data=SimpleNamespace(cache_dir=tmp_path / "cache"))
    return config, SimpleNamespace(name="words", data=data), built


def _quiet(text: str) -> None:
    pass


def test_data_is_built_once_and_found_again_by_its_content(tmp_path: Path) -> None:
    config, recipe, built = _recipe(tmp_path)
    folder = prepared.prepare(config, recipe, _quiet)
    assert prepared.prepare(config, recipe, _quiet) == folder
    assert built == ["one"]
    assert folder.name.startswith("words-")
    assert prepared.read_split(folder, "train")["word"].to_pylist() == ["one"]
    assert prepared.load_facts(folder)["splits"] == {"train": {"rows": 1}}
    assert prepared.prepare(*_recipe(tmp_path, "two")[:2], _quiet) != folder


def test_a_folder_that_lacks_a_file_or_has_a_cut_one_is_built_again(tmp_path: Path) -> None:
    config, recipe, built = _recipe(tmp_path)
    folder = prepared.prepare(config, recipe, _quiet)
    (folder / "train.arrow").write_bytes(b"")
    assert not prepared.is_whole(folder)
    assert prepared.prepare(config, recipe, _quiet) == folder
    (folder / "train.arrow").unlink()
    prepared.prepare(config, recipe, _quiet)
    assert built == ["one"] * 3
    assert prepared.is_whole(folder)


def test_a_build_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail(config: Any, folder: Path, say: Any) -> dict[str, Any]:
        (folder / "half").write_text("half")
        raise DataError("row 3 is no row")

    config, recipe, _ = _recipe(tmp_path, build=fail)
    with pytest.raises(DataError, match="row 3"):
        prepared.prepare(config, recipe, _quiet)
    assert [path.name for path in (tmp_path / "cache").iterdir() if not path.name.endswith(".lock")] == []


def test_two_preparations_at_once_build_the_data_once(tmp_path: Path) -> None:
    config, recipe, built = _recipe(tmp_path)
    threads = [threading.Thread(target=prepared.prepare, args=(config, recipe, _quiet)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert built == ["one"]


def test_a_folder_that_another_process_has_finished_meanwhile_is_kept(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "word").write_text(name)
        prepared.commit(tmp_path / name, tmp_path / "folder", {})
    assert (tmp_path / "folder" / "word").read_text() == "first"
    assert not (tmp_path / "second").exists()


def test_a_disk_that_lacks_the_space_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    said: list[str] = []
    with mounted(tmp_path / "small", "size=9m") as place:
        prepared.check_space(place / "not" / "there", 8 * 2**20, 0, said.append)
        with pytest.raises(StorageError, match=r"takes about 20 MiB.*has 9 MiB free.*data.cache_dir"):
            prepared.check_space(place, 20 * 2**20, 0, said.append)
        prepared.check_space(place, 20 * 2**20, 12 * 2**20, said.append)
    assert "takes about 8 MiB" in said[0]
