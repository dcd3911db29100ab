"""Find recipes and load their parts: shipped ones, those of installed packages, and folders of the user's own.

Torch-free until a part is read that imports torch.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import sys
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import dist_train
from dist_train.errors import ConfigError, ToolkitError
from dist_train.score import Score, read_score

ENTRY_POINTS = "dist_train.recipes"
"""Packages name their recipes in this entry-point group: NAME = "package.of.the.recipe"."""
_SUFFIXES = (".yaml", ".yml")
_PARTS = {
    "config": ("Config",),
    "data": (),
    "score": (),
    "task": (),
    "starter": ("write_starter",),
    "add_items": ("add_items",),
    "backtest": ("make_cuts", "compare_ages", "sentences", "table_rows", "figure"),
}


@dataclass(frozen=True)
class RecipeFile:
    name: str
    """What `dist-train run` takes, for example ticket_routing/demo."""
    path: Path
    summary: str
    """The first comment line of the file."""


@dataclass(frozen=True)
class Recipe:
    """The parts of one recipe, each imported when it is first read. A part without a file of its own is looked up in
    task.py, so that a small recipe is one file."""

    name: str
    package: str
    """What its parts are imported below."""
    folder: Path

    @property
    def is_shipped(self) -> bool:
        return self.package.startswith("recipes.")

    @property
    def config(self) -> Any:
        """config.py, with `Config`."""
        return self._part("config")

    @property
    def data(self) -> Any:
        """data.py, with `build` and, if need be, `describe`, `lengths` and `misfit` (see prepared.py)."""
        return self._part("data")

    @property
    def score(self) -> Score:
        """score.py, with `METRIC` and `measure` (see score.py here)."""
        return read_score(self._part("score"), str(self._file("score")))

    def source_files(self) -> list[Path]:
        """The modules of its folder, and of the packages in it."""
        packages = sorted(path.parent for path in self.folder.glob("*/__init__.py"))
        return sorted(self.folder.glob("*.py")) + [
            file for package in packages for file in sorted(package.rglob("*.py"))
        ]

    def make_task(self, config: Any, prepared: Path) -> Any:
        """The task of this config over a prepared folder, or over a model folder. Imports torch."""
        from dist_train.task import with_defaults

        module = self._part("task")
        made = module.make_task(config, prepared) if hasattr(module, "make_task") else module
        return with_defaults(made, str(self.folder))

    @property
    def starter(self) -> Any:
        """starter.py, with `write_starter` for `dist-train init`; None without one."""
        return self._part("starter") if (self.folder / "starter.py").is_file() else None

    @property
    def backtest(self) -> Any:
        """backtest.py, with `make_cuts`, `compare_ages`, `sentences`, `table_rows` and `figure` for `dist-train
        backtest`; None without one."""
        return self._part("backtest") if (self.folder / "backtest.py").is_file() else None

    @property
    def add_items(self) -> Any:
        """add_items.py, with `add_items` for `dist-train add-items`; None without one. Imports torch."""
        return self._part("add_items") if (self.folder / "add_items.py").is_file() else None

    def _file(self, part: str) -> Path:
        own = self.folder / f"{part}.py"
        return own if own.is_file() else self.folder / "task.py"

    def _part(self, part: str) -> ModuleType:
        file = self._file(part)
        if not file.is_file():
            raise ConfigError(
                f"{self.folder} is no recipe: it has no {part}.py and no task.py. A recipe needs {_needs()}."
            )
        module = _import(self.package, self.folder, file)
        missing = [name for name in _PARTS[part] if not hasattr(module, name)]
        if missing:
            raise ConfigError(f"{file} has no {' and no '.join(missing)}. A recipe needs {_needs()}.")
        return module


def recipes_folder() -> Path:
    """The folder of the shipped recipes: beside this package, wherever the user's working directory is."""
    return Path(dist_train.__file__).resolve().parent.parent / "recipes"


def list_recipes() -> list[RecipeFile]:
    """The recipe files that have a name, shipped and installed: each recipe, followed by its variants."""
    found = []
    for name, folder in sorted(_named_folders().items()):
        base = folder / "recipe.yaml"
        if not base.is_file():
            continue
        variants = sorted(path for path in folder.glob("*.yaml") if path != base)
        found.append(RecipeFile(name, base, _summary(base)))
        found.extend(RecipeFile(f"{name}/{path.stem}", path, _summary(path)) for path in variants)
    return found


def resolve_recipe_file(name: str) -> Path:
    """The file of a recipe: its name (`ticket_routing`, `ticket_routing/demo`), a .yaml file, or a folder with a
    recipe.yaml. ConfigError with the known names for anything else.
    """
    if name.endswith(_SUFFIXES):
        return Path(name).expanduser()
    known = {recipe.name: recipe.path for recipe in list_recipes()}
    if name in known:
        return known[name]
    folder = Path(name).expanduser()
    if (folder / "recipe.yaml").is_file():
        return folder / "recipe.yaml"
    if (folder / "config.yaml").is_file():
        raise ConfigError(f"{name} is a folder: name the file in it, {folder / 'config.yaml'}.")
    raise ConfigError(
        f"there is no recipe {name!r}.{_nearest(name, list(known))}\n"
        f"Known recipes: {', '.join(known)}; or give the path of your own file, ending in .yaml."
    )


def recipe_key(text: str | None, file: Path) -> str | None:
    """What `recipe:` in a file means: a name, or the absolute path of a folder, which is relative to the file.

    text: as it stands in the file; without it the folder of the file is the recipe, if a task.py lies there.
    """
    if text is None:
        folder = file.resolve().parent
        if not (folder / "task.py").is_file():
            return None
        named = (name for name, package in _installed().items() if _folder_of(package).resolve() == folder)
        return next(named, str(folder))
    if "/" in text or text.startswith((".", "~")):
        folder = file.absolute().parent / Path(text).expanduser()
        if folder.is_dir():
            return str(folder.resolve())
    return text


def load_recipe(key: str) -> Recipe:
    """The recipe that `recipe: KEY` in a resolved config names. ConfigError with the known names if there is none."""
    shipped = recipes_folder() / key
    if key.isidentifier() and (shipped / "config.py").is_file():
        return Recipe(key, f"recipes.{key}", shipped)
    if Path(key).is_absolute():
        folder = Path(key)
        if not (folder / "task.py").is_file():
            raise ConfigError(f"recipe is {key}, but no task.py lies there. A recipe needs {_needs()}.")
        marked = hashlib.sha256(str(folder).encode()).hexdigest()[:8]
        return Recipe(folder.name, f"own_recipe_{marked}", folder)
    installed = _installed()
    if key in installed:
        return Recipe(key, installed[key], _folder_of(installed[key]))
    known = sorted(_named_folders())
    variant = ""
    if "/" in key:
        variant = " A variant is built on with `extends:`, not with `recipe:`; a folder of your own must exist."
    raise ConfigError(
        f"recipe is {key!r}, but there is no such recipe.{_nearest(key, known)}{variant} Known: {', '.join(known)}."
    )


def code_fingerprint(sources: Iterable[Path]) -> str:
    """A hash of the toolkit's own source and of these files, a recipe's."""
    digest = hashlib.sha256()
    for path in (*sorted(Path(__file__).parent.glob("*.py")), *sources):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _needs() -> str:
    return (
        "config.py with Config, score.py with METRIC and measure, task.py with make_task or with build_model and rows, "
        "and data.py with build where data is prepared; a part without a file of its own is looked up in task.py"
    )


def _named_folders() -> dict[str, Path]:
    folders = {path.parent.name: path.parent for path in recipes_folder().glob("*/config.py")}
    return folders | {name: _folder_of(package) for name, package in _installed().items()}


def _installed() -> dict[str, str]:
    return {point.name: point.value for point in importlib.metadata.entry_points(group=ENTRY_POINTS)}


def _folder_of(package: str) -> Path:
    try:
        spec = importlib.util.find_spec(package)
    except ImportError:
        spec = None
    places = list(spec.submodule_search_locations or []) if spec is not None else []
    if not places:
        raise ConfigError(
            f"an installed package names {package} as a recipe ({ENTRY_POINTS}), but that is no package that can be "
            "imported: install it again, or mend its entry point."
        )
    return Path(places[0])


def _import(package: str, folder: Path, file: Path) -> ModuleType:
    if package.startswith("recipes."):
        import_shipped_recipes()
    elif package.startswith("own_recipe_") and package not in sys.modules:
        # A package of that folder alone: the user's other modules cannot shadow anything, nor be shadowed.
        made = ModuleType(package)
        made.__path__ = [str(folder)]
        sys.modules[package] = made
    try:
        return importlib.import_module(f"{package}.{file.stem}")
    except ToolkitError:
        raise
    except Exception as error:
        raise ConfigError(_import_failed(file, folder, error)) from error


def _import_failed(file: Path, folder: Path, error: Exception) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).parent == folder]
    where = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else str(file)
    if isinstance(error, SyntaxError) and error.filename:
        where = f"{error.filename}:{error.lineno}"
    text = f"{where}: {type(error).__name__}: {error}"
    beside = getattr(error, "name", None) or ""
    if isinstance(error, ModuleNotFoundError) and (folder / f"{beside}.py").is_file():
        text += f"\nThe files of a recipe import each other with a dot: from .{beside} import ..."
    return text


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


def import_shipped_recipes() -> None:
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
