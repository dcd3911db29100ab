"""A config as the text of a recipe file, with the place where each value was set. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from dist_train.config import RunConfig, Section


def dump(config: RunConfig, sources: Mapping[str, str], name: str) -> str:
    """The resolved config as a recipe file. The name is a comment only, so that running it makes a run of its own."""
    lines = [f"# name: {name}"]
    _dump_section(config, sources, "", lines)
    return "\n".join(lines) + "\n"


def as_yaml(value: Any) -> str:
    """The value on one line."""
    words = "".join(map(str, value)) if isinstance(value, list) else str(value)
    # Unicode has line ends of its own, which PyYAML writes as they are and reads as a blank: escape what is not plain.
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=words.isprintable(), width=10**9)
    return text.removesuffix("\n").removesuffix("\n...")


def _dump_section(section: Section, sources: Mapping[str, str], prefix: str, lines: list[str]) -> None:
    depth = prefix.count(".")
    for name in type(section).model_fields:
        value, key = getattr(section, name), prefix + name
        if isinstance(value, Section):
            lines.append(f"{'  ' * depth}{name}:")
            _dump_section(value, sources, f"{key}.", lines)
        elif key != "name":
            text = as_yaml(str(value) if isinstance(value, Path) else value)
            origin = f"  # {sources[key]}" if key in sources else ""
            lines.append(f"{'  ' * depth}{name}: {text}{origin}")
