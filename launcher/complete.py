"""What the shell offers after a Tab: recipes, runs, and the keys of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


def recipes(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    from dist_train.recipe import list_recipes

    names = [recipe.name for recipe in list_recipes()]
    files = [str(path) for path in sorted(Path().glob("*.yaml"))]
    return [name for name in names + files if name.startswith(incomplete)]


def runs(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    found = [str(path.parent) for path in sorted(Path().glob("*/*/config.yaml"))]
    return [path for path in found if path.startswith(incomplete)]


def settings(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[Any]:
    from dist_train.config_keys import keys_of
    from dist_train.errors import ToolkitError
    from dist_train.recipe import load_recipe

    try:
        recipe = load_recipe(str(context.params.get("recipe") or "ticket_routing").partition("/")[0])
    except ToolkitError:
        return []
    from click.shell_completion import CompletionItem

    keys = keys_of(recipe.config.Config).values()
    return [
        CompletionItem(f"{key.name}=", help=key.field.description) for key in keys if key.name.startswith(incomplete)
    ]
