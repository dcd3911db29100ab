"""Prepared data of recipes that say little: found again by content, and never stale."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dist_train.config_io import load
from dist_train.errors import ConfigError, DataError
from dist_train.prepared import load_facts, prepare, write_random_splits
from dist_train.recipe import load_recipe

TASK = """
import json
from dist_train.config import CachedData, RunConfig, path_field
from dist_train.task import ListedRows
from .values import SCALE

class Data(CachedData):
    path: str = path_field("rows.json")

class Config(RunConfig):
    data: Data = Data()

METRIC = "accuracy"
def measure(table): ...
def build_model(): ...
def rows(split): ...
"""
BUILD = """
def build(config, folder, say):
    rows = [SCALE * value for value in json.load(open(config.data.path))]
    (folder / "rows.json").write_text(json.dumps(rows))
    return {"splits": {name: {"rows": len(rows)} for name in ("train", "validation", "test")}}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe whose module has a name of its own, so that each test imports it afresh."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    made = tmp_path / "mine"
    made.mkdir()
    (made / "recipe.yaml").write_text("data: {path: ../rows.json, cache_dir: ../cache}\ntrain: {steps: 3}\n")
    (made / "values.py").write_text("SCALE = 1\n")
    (made / "task.py").write_text(TASK + BUILD)
    Path("rows.json").write_text("[1, 2, 3]")
    return made


def _prepared(name: str = "mine") -> tuple[Path, dict[str, Any]]:
    config: Any = load(name).config
    folder = prepare(config, load_recipe(config.recipe), lambda text: None)
    return folder, load_facts(folder)


def test_what_is_the_same_is_found_again_and_completed_for_the_report(folder: Path) -> None:
    first, facts = _prepared()
    assert _prepared()[0] == first
    assert facts["rows"] == 9
    assert facts["leaks"] == {}
    Path("rows.json").write_text("[1, 2, 3, 4]")
    again, grown = _prepared()
    assert again != first
    assert grown["fingerprint"] != facts["fingerprint"]


def test_a_helper_that_changes_what_is_built_builds_it_again(folder: Path) -> None:
    _, facts = _prepared()
    (folder / "values.py").write_text("SCALE = 2\n")
    folder.rename("twice")  # a process imports a module once; another folder is another module
    second, changed = _prepared("twice")
    assert json.loads((second / "rows.json").read_text()) == [2, 4, 6]
    assert changed["fingerprint"] != facts["fingerprint"]


def test_code_that_builds_the_same_data_leaves_the_fingerprint(folder: Path) -> None:
    first, facts = _prepared()
    with open(folder / "task.py", "a") as stream:
        stream.write("# a remark\n")
    second, same = _prepared()
    assert second != first
    assert same["fingerprint"] == facts["fingerprint"]


def test_rows_that_nobody_prepares_are_looked_at_each_time(folder: Path) -> None:
    (folder / "task.py").write_text(
        TASK + "def rows(split): return ListedRows(json.load(open('rows.json')) * (10 if split == 'train' else 1))\n"
    )
    assert _prepared()[1]["splits"]["train"]["rows"] == 30
    Path("rows.json").write_text("[1, 2]")
    facts = _prepared()[1]
    assert facts["splits"]["train"]["rows"] == 20


def test_a_file_that_is_missing_is_named_with_its_key(folder: Path) -> None:
    Path("rows.json").unlink()
    with pytest.raises(DataError, match=r"data.path is .*rows.json, but there is no such file"):
        _prepared()


def test_rows_alike_in_every_column_go_to_one_side(tmp_path: Path) -> None:
    import pyarrow as pa

    table = pa.table({"x": [value // 2 for value in range(200)]})
    facts = write_random_splits(tmp_path, table)
    assert facts["leaks"] == {"exact_duplicates": 100}
    sides = [
        set(pa.ipc.open_stream(tmp_path / f"{name}.arrow").read_all()["x"].to_pylist()) for name in facts["splits"]
    ]
    assert not sides[0] & sides[1]
    assert not (sides[0] | sides[1]) & sides[2]
    with pytest.raises(DataError, match="too few"):
        write_random_splits(tmp_path, table.slice(0, 2))


def test_a_task_that_misses_a_method_is_said_before_there_is_a_run(folder: Path) -> None:
    from dist_train.start_run import new_run

    (folder / "task.py").write_text((TASK + BUILD).replace("def build_model", "def build_modle"))
    with pytest.raises(ConfigError, match="has no build_model"):
        new_run("mine", ["name=one"], lambda start: None, None)
    assert not Path("runs").exists()
