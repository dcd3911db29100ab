"""Find recipes: a recipe file by its name or path, a recipe's modules by importlib. Torch-free until `task` is read."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import dist_train
from dist_train.errors import ConfigError

_SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class RecipeFile:
    name: str
    """What `dist-train run` takes, for example ticket_routing/demo."""
    path: Path
    summary: str
    """The first comment line of the file."""


@dataclass(frozen=True)
class Recipe:
    """The modules of one recipe, each imported when it is first read."""

    name: str

    @property
    def config(self) -> Any:
        """config.py, with `Config`. Torch-free, like `data` and `score`."""
        return self._module("config")

    @property
    def data(self) -> Any:
        """data.py, with `describe`, `build`, `lengths` and `misfit`; prepared.py does the rest."""
        return self._module("data")

    @property
    def score(self) -> Any:
        """score.py, with `METRIC`, `metrics`, `intervals` and `baselines`."""
        return self._module("score")

    @property
    def task(self) -> Any:
        """task.py, with `make_task`. Imports torch."""
        return self._module("task")

    def _module(self, module: str) -> ModuleType:
        _import_own_recipes()
        return importlib.import_module(f"recipes.{self.name}.{module}")


def recipes_folder() -> Path:
    """The folder of the shipped recipes: beside this package, wherever the user's working directory is."""
    return Path(dist_train.__file__).resolve().parent.parent / "recipes"


def list_recipes() -> list[RecipeFile]:
    """The shipped recipe files: each recipe, followed by its variants."""
    found = []
    for base in sorted(recipes_folder().glob("*/recipe.yaml")):
        variants = sorted(path for path in base.parent.glob("*.yaml") if path != base)
        found.append(RecipeFile(base.parent.name, base, _summary(base)))
        found.extend(RecipeFile(f"{base.parent.name}/{path.stem}", path, _summary(path)) for path in variants)
    return found


def resolve_recipe_file(name: str) -> Path:
    """The file of a shipped recipe (`ticket_routing`, `ticket_routing/demo`), or `name` itself if it is a .yaml path.

    ConfigError with the known names for anything else.
    """
    if name.endswith(_SUFFIXES):
        return Path(name).expanduser()
    known = {recipe.name: recipe.path for recipe in list_recipes()}
    if name in known:
        return known[name]
    folder = Path(name)
    inside = [path for path in (folder / "recipe.yaml", folder / "config.yaml") if path.is_file()]
    if inside:
        raise ConfigError(f"{name} is a folder: name the file in it, {inside[0]}.")
    raise ConfigError(
        f"there is no recipe {name!r}.{_nearest(name, list(known))}\n"
        f"Known recipes: {', '.join(known)}; or give the path of your own file, ending in .yaml."
    )


def load_recipe(key: str) -> Recipe:
    """The recipe that `recipe: KEY` in a config names. ConfigError with the known names if there is none."""
    if key.isidentifier() and (recipes_folder() / key / "config.py").is_file():
        return Recipe(key)
    known = sorted(path.parent.name for path in recipes_folder().glob("*/config.py"))
    variant = " A variant is built on with `extends:`, not with `recipe:`." if "/" in key else ""
    raise ConfigError(
        f"recipe is {key!r}, but there is no such recipe.{_nearest(key, known)}{variant} Known: {', '.join(known)}."
    )


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" Did you mean {near[0]}?" if near else ""


def _summary(path: Path) -> str:
    """The first comment line of a recipe file."""
    with open(path, encoding="utf-8") as stream:
        for line in stream:
            if line.startswith("# ") and "yaml-language-server" not in line:
                return line[2:].strip()
    return ""


def _import_own_recipes() -> None:
    """Import the `recipes` package beside this one by its place: the user's folder may hold a `recipes/` of its own,
    which comes first on the path under `python -m`."""
    folder = recipes_folder()
    loaded = sys.modules.get("recipes")
    if loaded is None:
        spec = importlib.util.spec_from_file_location(
            "recipes", folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        if spec is None or spec.loader is None:
            raise ConfigError(f"the installation is incomplete: {folder} is missing. Install dist-train again.")
        loaded = importlib.util.module_from_spec(spec)
        sys.modules["recipes"] = loaded
        spec.loader.exec_module(loaded)
    places = [Path(place).resolve() for place in getattr(loaded, "__path__", [])]
    if folder not in places:
        where = places[0] if places else getattr(loaded, "__file__", "an unknown place")
        raise ConfigError(
            f"another package named `recipes` is imported already, from {where}: this program has imported it before "
            f"dist-train could import its own from {folder}. Import dist_train first, or rename the other one."
        )
