"""What can be run: the shipped recipes, a recipe's keys, and its JSON Schema."""

from __future__ import annotations

import json

from pydantic_core import PydanticUndefined
from rich.console import Console

from dist_train import config_io
from dist_train.config_keys import keys_of
from dist_train.recipe import list_recipes, load_recipe


def print_recipes() -> None:
    for recipe in list_recipes():
        print(f"{recipe.name:28s}{recipe.summary}")
    print("\nA recipe's keys:  dist-train recipes --keys ticket_routing")


def print_keys(name: str) -> None:
    """Every key with its default, what it may hold, and what it means."""
    console = Console(highlight=False)
    for key in keys_of(load_recipe(name.partition("/")[0]).config.Config).values():
        default = key.field.get_default(call_default_factory=True)
        shown = "required" if default is PydanticUndefined else json.dumps(default, default=str)
        console.print(f"[bold]{key.name}[/bold] = ", end="")
        console.print(f"{shown}   ({key.expected})", markup=False, soft_wrap=True)
        console.print(f"    {key.field.description}", markup=False, soft_wrap=True)


def print_schema(name: str) -> None:
    print(json.dumps(config_io.json_schema(name.partition("/")[0]), indent=2))
