"""What can be run: the shipped recipes, a recipe's keys, and its JSON Schema."""

from __future__ import annotations

import json

from rich.console import Console

from dist_train import config_io
from dist_train.config_keys import keys_of
from dist_train.recipe import list_recipes


def print_recipes() -> None:
    for recipe in list_recipes():
        print(f"{recipe.name:28s}{recipe.summary}")
    print("\nA recipe's keys:  dist-train recipes --keys ticket_routing")


def print_keys(name: str) -> None:
    """Every key with its value in the recipe, what it may hold, and what it means."""
    console = Console(highlight=False)
    config = config_io.load(name, site=False).config
    values = config_io.flatten(config)
    for key in keys_of(type(config)).values():
        shown = json.dumps(values[key.name], default=str)
        console.print(f"[bold]{key.name}[/bold] = ", end="")
        console.print(f"{shown}   ({key.expected})", markup=False, soft_wrap=True)
        console.print(f"    {key.field.description}", markup=False, soft_wrap=True)


def print_schema(name: str) -> None:
    print(json.dumps(config_io.json_schema(name.partition("/")[0]), indent=2))
