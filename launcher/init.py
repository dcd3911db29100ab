"""dist-train init: a starter for the user's own data, made by looking at it."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

from dist_train import config_io
from dist_train.errors import BusyError, ConfigError
from dist_train.file_profile import profile_file
from dist_train.recipe import load_recipe, resolve_recipe_file
from dist_train.rundir import unwritable

_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def init(name: str, recipe_name: str, data: str, label: str | None, text: list[str]) -> Path:
    """Write NAME/recipe.yaml. ConfigError, DataError, BusyError where something stands there already."""
    folder = Path(name)
    file = folder / "recipe.yaml"
    if file.exists():
        raise BusyError(f"{file} exists already; nothing in it was touched. Give another name, or remove it.")
    if _RUN_NAME.fullmatch(folder.name) is None:
        raise ConfigError(
            f"NAME is {name!r}, but only letters, digits, '.', '_' and '-' are allowed in its last part, which names "
            "runs too."
        )
    base = resolve_recipe_file(recipe_name)
    starter = load_recipe(config_io.load(str(base), site=False).config.recipe).starter
    if starter is None:
        raise ConfigError(
            f"--from is {recipe_name}, which has no starter: write a recipe.yaml that has `extends:` and that name or "
            "file. ticket_routing has one."
        )
    # As a path from the new file, so that the two can be moved together.
    path = data if Path(data).is_absolute() else os.path.relpath(data, folder)
    words = starter.write_starter(profile_file(data), path, label, text)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(words, encoding="utf-8")
    except OSError as error:
        raise unwritable(folder, error, "NAME") from error
    config_io.load(str(file))  # what we write we can read
    print(words)
    shown = shlex.quote(str(file))
    print(f"written to {file}\n\nnext:\n  dist-train plan {shown}  # check settings and data, start nothing")
    print(f"  dist-train run {shown} name={folder.name}  # train, evaluate, report")
    return file
