"""Hold a file or launcher of the user's own against the recipe: a contradiction names both places. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dist_train.errors import ConfigError, UnsafeInputError
from dist_train.yaml_data import MAX_DEPTH, read_beginning, refuse_large

# How the files begin that may run code when they are loaded: a pickle, and the zip that torch.save makes.
_PICKLES = (b"\x80", b"PK\x03\x04")

# What a script has instead of a recipe's keys.
SCRIPT_FLAGS = {
    "parallel.strategy": "--strategy",
    "parallel.offload": "--offload",
    "parallel.nodes": "--nodes",
    "parallel.processes_per_node": "--gpus-per-node",
    "parallel.deepspeed_config": "--deepspeed-config",
    "train.precision": "--precision",
}


@dataclass(frozen=True)
class Settings:
    """What the recipe says, and where it says it."""

    values: Mapping[str, Any]
    """By dotted key."""
    sources: Mapping[str, str]
    """Where each was set; keys at their default are absent."""
    flags: Mapping[str, str] = field(default_factory=dict)
    """What the keys are called for a user's own script."""

    def stated(self, key: str, resolved: Any = None) -> str:
        """For example `train.precision is auto (mine.yaml:4), here fp32`."""
        value = self.values.get(key)
        here = f", here {show(resolved)}" if resolved is not None and value != resolved else ""
        return f"{self.name(key)} is {show(value)} ({self.sources.get(key, 'the default')}){here}"

    def name(self, key: str) -> str:
        return self.flags.get(key, key)


def show(value: Any) -> str:
    """As the user would write it."""
    return value if isinstance(value, str) else json.dumps(value)


def refuse(problems: list[str]) -> None:
    """ConfigError with all contradictions at once, if there are any."""
    if problems:
        raise ConfigError("\n".join(problems))


def read_bounded(path: Path, shown: str) -> str:
    """The text of a small file. ConfigError where there is none, UnsafeInputError for what is no text."""
    content = read_beginning(path, shown)
    if content.startswith(_PICKLES):
        raise UnsafeInputError(f"{shown} is a pickle or an archive, which may run code: give a text file.")
    refuse_large(content, shown)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{shown} is not UTF-8 text: save it as UTF-8.") from error


def read_json_table(path: Path, shown: str) -> dict[str, Any]:
    """The JSON object in a small file."""
    try:
        value = json.loads(read_bounded(path, shown), object_pairs_hook=_each_key_once, parse_constant=_no_constant)
    except RecursionError as error:
        raise UnsafeInputError(f"{shown}: more than {MAX_DEPTH} levels lie in each other.") from error
    except ValueError as error:
        raise ConfigError(f"{shown}: this is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{shown}: a JSON object is expected, {{...}} with keys and values.")
    return value


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice} stands twice in one group: keep one")
    return table


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is no JSON number")
