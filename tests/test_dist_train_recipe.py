"""Recipes of the user's own: a folder, an installed package, and what is said when a part is missing."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from dist_train.config_io import load, result_fingerprint
from dist_train.errors import ConfigError
from dist_train.recipe import list_recipes, load_recipe

WHOLE = """
from dist_train.config import RunConfig as Config
METRIC = "accuracy"
def measure(table): return lambda weights: {"accuracy": 1.0}
def build_model(): ...
def rows(split): ...
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    made = tmp_path / "mine"
    made.mkdir()
    (made / "recipe.yaml").write_text("train: {steps: 3}\n")
    (made / "task.py").write_text(WHOLE)
    return made


def _refused(action: object) -> str:
    with pytest.raises(ConfigError) as refusal:
        action()  # type: ignore[operator]
    return str(refusal.value)


@pytest.mark.parametrize("name", ["mine", "mine/recipe.yaml"])
def test_a_folder_with_a_task_beside_its_recipe_file_is_a_recipe(folder: Path, name: str) -> None:
    loaded = load(name)
    assert loaded.config.recipe == str(folder)
    assert load_recipe(loaded.config.recipe).score.metric == "accuracy"
    assert load_recipe(loaded.config.recipe).make_task(loaded.config, folder).build_model() is None


def test_a_file_elsewhere_names_the_folder_or_extends_its_file(folder: Path) -> None:
    Path("a.yaml").write_text("recipe: ./mine\ntrain: {steps: 3}\n")
    Path("b.yaml").write_text("extends: mine/recipe.yaml\n")
    assert load("a.yaml").config.recipe == load("b.yaml").config.recipe == str(folder)


def test_the_result_does_not_depend_on_where_the_recipe_lies(folder: Path) -> None:
    before = result_fingerprint(load("mine").config)
    Path("other").mkdir()
    folder.rename("other/mine")
    assert result_fingerprint(load("other/mine").config) == before


def test_parts_that_grow_get_files_of_their_own_and_import_each_other_with_a_dot(folder: Path) -> None:
    (folder / "names.py").write_text("LABEL = 'yes'")
    (folder / "score.py").write_text("from .names import LABEL\nMETRIC = LABEL\ndef measure(table): ...\n")
    assert load_recipe(str(folder)).score.metric == "yes"


def test_a_folder_may_be_called_like_a_package(folder: Path) -> None:
    folder.rename("datasets")
    recipe = load_recipe(load("datasets").config.recipe)
    assert recipe.name == "datasets"
    assert recipe.score.metric == "accuracy"
    assert importlib.import_module("datasets").load_dataset  # the library, not the folder


def test_a_folder_without_a_task_is_named_with_what_a_recipe_needs(folder: Path) -> None:
    (folder / "task.py").unlink()
    assert "mine/recipe.yaml: recipe is missing" in _refused(lambda: load("mine"))
    (folder / "recipe.yaml").write_text("recipe: .\n")
    text = _refused(lambda: load("mine"))
    assert f"recipe is {folder}, but no task.py lies there" in text
    assert "score.py with METRIC and measure" in text


@pytest.mark.parametrize(
    ("removed", "words"),
    [
        ("def build_model(): ...", ["has no build_model", "needs build_model() and rows(split)"]),
        ("def rows(split): ...", ["has no rows"]),
        ('METRIC = "accuracy"', ["task.py has no METRIC", "picks the best"]),
        ("from dist_train.config import RunConfig as Config", ["task.py has no Config"]),
    ],
)
def test_what_a_task_lacks_is_named(folder: Path, removed: str, words: list[str]) -> None:
    (folder / "task.py").write_text(WHOLE.replace(removed, ""))

    def everything() -> None:
        config = load("mine").config
        recipe = load_recipe(config.recipe)
        assert recipe.score
        recipe.make_task(config, folder)

    text = _refused(everything)
    assert all(word in text for word in words), text


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import names", ["task.py:1: ModuleNotFoundError", "with a dot: from .names import"]),
        ("x = 1\ny = x / 0", ["task.py:2: ZeroDivisionError"]),
        ("def f(:\n  pass", ["task.py:1: SyntaxError"]),
    ],
)
def test_code_that_cannot_be_imported_is_named_with_its_line(folder: Path, code: str, words: list[str]) -> None:
    (folder / "names.py").write_text("")
    (folder / "task.py").write_text(code)
    text = _refused(lambda: load("mine"))
    assert all(word in text for word in words), text


def test_a_recipe_of_an_installed_package_runs_by_its_name(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    (site / "our_models-1.dist-info").mkdir(parents=True)
    (site / "our_models-1.dist-info" / "METADATA").write_text("Name: our-models\nVersion: 1\n")
    (site / "our_models-1.dist-info" / "entry_points.txt").write_text("[dist_train.recipes]\nours = our_models.ours\n")
    (site / "our_models").mkdir()
    (site / "our_models" / "__init__.py").write_text("")
    folder.rename(site / "our_models" / "ours")
    monkeypatch.syspath_prepend(str(site))
    assert "ours" in [recipe.name for recipe in list_recipes()]
    assert load("ours").config.recipe == "ours"
    Path("mine.yaml").write_text("recipe: ours\n")
    assert load_recipe(load("mine.yaml").config.recipe).score.metric == "accuracy"
