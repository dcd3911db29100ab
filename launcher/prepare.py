"""dist-train prepare: all that comes before the GPUs, on CPUs: fetch, read, validate, split. Later runs find it."""

from __future__ import annotations

import shlex
from typing import Any

from dist_train import config_io
from dist_train.recipe import load_recipe
from dist_train.start_run import check_metric, pinned, prepare_data


def prepare_recipe(recipe_name: str, overrides: list[str]) -> None:
    """Prepare the recipe's data, print what it holds and what to type next."""
    loaded = config_io.load(recipe_name, overrides)
    recipe = load_recipe(loaded.config.recipe)
    check_metric(loaded.config, recipe)
    config = pinned(loaded, recipe).config
    facts = prepare_data(config, recipe, loaded.sources)
    for name, text in _lines(facts):
        print(f"{name:<15}{text}")
    print(f"next           {shlex.join(['dist-train', 'run', recipe_name, *overrides])}")


def _lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """What is worth knowing of prepared data; a recipe need not know all of it."""
    lines = []
    if "rows" in facts:
        labels = f", {len(facts['labels'])} labels" if "labels" in facts else ""
        lines.append(("rows", f"{facts['rows']}{labels}"))
    splits = ", ".join(f"{name} {split['rows']}" for name, split in facts["splits"].items())
    method = f" ({facts['split']['method']})" if "split" in facts else ""
    lines.append(("splits", splits + method))
    if "labels" in facts:
        training = facts["splits"]["train"]["labels"]
        ordered = sorted(training.items(), key=lambda item: -item[1])
        shown = ", ".join(f"{label} {count}" for label, count in ordered[:10])
        lines.append(("labels", f"in training: {shown}{' …' if len(ordered) > 10 else ''}"))
    if facts.get("leaks"):
        counted = (f"{name.replace('_', ' ')} {_total(value)}" for name, value in facts["leaks"].items())
        lines.append(("leaks", ", ".join(counted)))
    if "lengths" in facts:
        lines.append(("lengths", ", ".join(f"{name} {value:g}" for name, value in facts["lengths"].items())))
    if "vocabulary" in facts:
        lines.append(("vocabulary", str(facts["vocabulary"])))
    lines += [("warning", warning) for warning in facts.get("warnings", [])]
    return [*lines, ("folder", facts["folder"])]


def _total(value: Any) -> Any:
    return sum(value.values()) if isinstance(value, dict) else value
