"""From recipe file, site file and command line to one typed config that knows where each value came from. Torch-free.

Precedence: defaults < site file < what the recipe file extends < recipe file < key=value. Editors complete recipe files
with `dist-train recipes --schema NAME > schema.json` and a first line `# yaml-language-server: $schema=schema.json`.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Many
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dist_train.config import RunConfig, Section, SlurmConfig
from dist_train.config_keys import Key, MismatchError, convert, keys_of, nearest_keys, sections_of, show
from dist_train.config_text import as_yaml
from dist_train.errors import ConfigError
from dist_train.recipe import load_recipe, recipe_key, resolve_recipe_file
from dist_train.rundir import RunDir
from dist_train.yaml_data import Node, Scalar, Table, parse, read_file

# What may change on resume: it says where and how a run trains, not what comes out of it.
RESUMABLE = (
    "parallel.*",
    "checkpoint.*",
    "track.*",
    "slurm.*",
    "train.stop_after_steps",
    "train.micro_batch_size",
    "train.activation_checkpointing",
    "train.compile",
    "train.deterministic",
    "train.profile",
    "eval.batch_size",
    "task.target_accuracy",
    "data.cache_dir",
    "data.stage_to",
    "data.offline",
)
# Nor do these, which belong to no attempt.
_NO_PART = ("name", "output_dir", "ladder")
_VARIABLE = re.compile(r"\$(\w+|\{\w+\})")


@dataclass(frozen=True)
class Given:
    """A value as it was written, and where."""

    node: Node
    source: str
    layer: int
    folder: Path
    """What a relative path is relative to."""


@dataclass(frozen=True)
class Loaded:
    config: RunConfig
    sources: Mapping[str, str]
    """Where each key's value was set, for example mine.yaml:14; keys at their default are absent."""
    recipe_file: Path


def load(recipe: str, overrides: Many[str] = (), site: bool = True) -> Loaded:
    """The config of a recipe name or file under `overrides`. ConfigError lists every problem at once."""
    file = resolve_recipe_file(recipe)
    files = _with_extended(file)
    key, key_file = _recipe_of(files)
    if key is None:
        raise ConfigError(
            f"{file}: recipe is missing: name the recipe, or build on one with `extends: ticket_routing`. A recipe of "
            "your own has its task.py beside the file."
        )
    model: type[RunConfig] = load_recipe(key).config.Config
    given: dict[str, Given] = {}
    problems: list[str] = []
    site_path = site_file()
    layers = [(site_path, read_file(site_path, str(site_path)))] if site and site_path.is_file() else []
    for layer, (path, table) in enumerate([*layers, *reversed(files)]):
        shown = _shown(path)
        for name, node in _walk(table, model, shown, problems):
            given[name] = Given(node, f"{shown}:{node.line}", layer, path.absolute().parent)
    line = given["recipe"].node.line if "recipe" in given else 1
    given["recipe"] = Given(Scalar(key, line), f"{_shown(key_file)}:{line}", 0, key_file.absolute().parent)
    for text in overrides:
        _take_override(text, model, given, len(files) + len(layers), problems)
    _settle_length(given)
    config = _build(model, given, problems)
    return Loaded(config, {name: value.source for name, value in given.items()}, file)


def site_file() -> Path:
    """The user's or the site's own defaults for all runs."""
    root = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(root).expanduser() / "dist-train" / "site.yaml"


def site_output_dir() -> str | None:
    """output_dir of the site file; None when that sets none."""
    path = site_file()
    text = _text_of(read_file(path, str(path)), "output_dir") if path.is_file() else None
    return None if text is None else str(_resolve(text, path.absolute().parent, keys_of(RunConfig)["output_dir"]))


def slurm_settings(overrides: Many[str]) -> SlurmConfig:
    """The keys slurm.* of the site file and of the command line, for what has no recipe."""
    problems: list[str] = []
    given: dict[str, Given] = {"recipe": Given(Scalar("none", 1), "", 0, Path.cwd())}
    path = site_file()
    if path.is_file():
        # Its keys for recipes are theirs to judge.
        for name, node in _walk(read_file(path, str(path)), RunConfig, _shown(path), []):
            given[name] = Given(node, f"{_shown(path)}:{node.line}", 0, path.absolute().parent)
    for text in overrides:
        _take_override(text, RunConfig, given, 1, problems)
        if not text.startswith("slurm."):
            problems.append(f"command line: {text}: beside the options of a script only slurm.* can be set.")
    kept = {name: value for name, value in given.items() if name == "recipe" or name.startswith("slurm.")}
    return _build(RunConfig, kept, problems).slurm


def load_run_config(run: RunDir) -> RunConfig:
    """The resolved config of a run directory: its file alone, no site file."""
    return load(str(run.config), site=False).config


def recorded_sources(run: RunDir) -> dict[str, str]:
    """Where each value in a run's config.yaml was set, from the remarks that `config_text.dump` wrote behind them."""
    lines = run.config.read_text().splitlines()
    places = load(str(run.config), site=False).sources
    remarks = {key: lines[int(place.rpartition(":")[2]) - 1].rpartition("  # ") for key, place in places.items()}
    return {key: remark for key, (_, mark, remark) in remarks.items() if mark}


def resume_overrides(config: RunConfig, overrides: Many[str]) -> RunConfig:
    """`config` with changes that a resumed run may have. ConfigError for a key that defines the result."""
    model = type(config)
    problems: list[str] = []
    given: dict[str, Given] = {}
    for text in overrides:
        _take_override(text, model, given, 0, problems)
    for name in given:
        if not _is_resumable(name):
            problems.append(
                f"{name} cannot change on resume: it defines the run or its result. These can: "
                f"{', '.join(RESUMABLE)}.\n  To train with another value start a new run."
            )
    for name, value in flatten(config).items():
        if name not in given and value is not None:
            given[name] = Given(_as_node(value), "config.yaml", 0, Path("/"))
    return _build(model, given, problems)


def result_fingerprint(config: RunConfig) -> str:
    """A hash of every setting that defines the result. It notices a config.yaml that was edited between attempts."""
    settings = {
        # The folder of a recipe of one's own may lie elsewhere on another machine; its code has a fingerprint.
        name: Path(value).name if name == "recipe" else value
        for name, value in flatten(config).items()
        # A key that a later version adds, off by default, changes nothing.
        if value is not None and value is not False and name not in _NO_PART and not _is_resumable(name)
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _is_resumable(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in RESUMABLE)


def flatten(config: Section, prefix: str = "") -> dict[str, Any]:
    """Every setting by its dotted name, in the order of the sections; paths as text."""
    flat: dict[str, Any] = {}
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, Section):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = str(value) if isinstance(value, Path) else value
    return flat


def json_schema(recipe: str) -> dict[str, Any]:
    """The JSON Schema of a recipe's files, for editors."""
    files = _with_extended(resolve_recipe_file(recipe))
    key, _ = _recipe_of(files)
    schema: dict[str, Any] = load_recipe(str(key)).config.Config.model_json_schema()
    schema["properties"]["extends"] = {"type": "string", "description": "Recipe name or file that this one builds on."}
    schema["required"] = []
    return schema


def _with_extended(file: Path) -> list[tuple[Path, Table]]:
    """The file and what it extends, nearest first."""
    chain: list[tuple[Path, Table]] = []
    while True:
        if any(file.resolve() == seen.resolve() for seen, _ in chain):
            raise ConfigError(
                f"{_shown(file)}: extends goes in a circle: {', '.join(_shown(path) for path, _ in chain)}."
            )
        table = read_file(file, _shown(file))
        chain.append((file, table))
        base = _text_of(table, "extends")
        if base is None:
            return chain
        if base.endswith((".yaml", ".yml")):
            file = file.parent / Path(base).expanduser()
            continue
        try:
            file = resolve_recipe_file(base)
        except ConfigError as error:
            raise ConfigError(f"{_shown(file)}: extends: {error}") from error


def _recipe_of(files: list[tuple[Path, Table]]) -> tuple[str | None, Path]:
    """The recipe that a file and what it extends name, and which of them does; by default the folder of the last."""
    for path, table in files:
        text = _text_of(table, "recipe")
        if text is not None:
            return recipe_key(text, path), path
    path = files[-1][0]
    return recipe_key(None, path), path


def _text_of(table: Table, key: str) -> str | None:
    node = next((entry.value for entry in table.entries if entry.key == key), None)
    return node.text if isinstance(node, Scalar) and not node.is_null else None


def _walk(
    table: Table, model: type[RunConfig], shown: str, problems: list[str], prefix: str = ""
) -> Iterator[tuple[str, Node]]:
    """The settings in a file by dotted name; what is no setting goes to `problems`."""
    keys, sections = keys_of(model), sections_of(model)
    for entry in table.entries:
        name = prefix + entry.key
        where = f"{shown}:{entry.line}"
        if name == "extends":
            continue
        if name in sections:
            if isinstance(entry.value, Table):
                yield from _walk(entry.value, model, shown, problems, f"{name}.")
            elif not (isinstance(entry.value, Scalar) and entry.value.is_null):
                problems.append(f"{where}: {name} is {show(entry.value)}, but holds a group of keys.")
        elif name in keys:
            yield name, entry.value
        else:
            problems.append(f"{where}: {_unknown(name, model)}")


def _unknown(name: str, model: type[RunConfig]) -> str:
    group = name.rpartition(".")[0]
    sections = [section for section in sections_of(model) if section != group]
    near = nearest_keys(name, [*keys_of(model), *sections]) or _described_as(name, model)
    if near:
        return f"{name} is no known key. Did you mean {' or '.join(near)}?"
    if group and group not in sections_of(model):
        return f"{name} is no known key. Known groups: {', '.join(sections_of(model))}."
    known = ", ".join(key.rpartition(".")[2] for key in keys_of(model) if key.rpartition(".")[0] == group)
    return f"{name} is no known key. Known in {group or 'the top level'}: {known}."


def _described_as(name: str, model: type[RunConfig]) -> list[str]:
    """The key that is described in the very words of `name`: optim.lr for learning_rate."""
    words = name.rpartition(".")[2].replace("_", " ")
    described = {key.name: key.field.description or "" for key in keys_of(model).values()}
    return sorted((key for key in described if words in described[key].lower()), key=lambda key: len(described[key]))[
        :1
    ]


def _take_override(text: str, model: type[RunConfig], given: dict[str, Given], layer: int, problems: list[str]) -> None:
    name, equals, value = text.partition("=")
    if not equals:
        problems.append(f"command line: {text!r} is no setting: write key=value, for example train.epochs=3.")
        return
    name = name.removeprefix("--")
    if name in sections_of(model):
        problems.append(f"command line: {name} is a group of keys: set one of them, for example {name}.KEY=VALUE.")
    elif name not in keys_of(model):
        problems.append(f"command line: {_unknown(name, model)}")
    else:
        node: Node = Scalar(value, 1, plain=True, typed=True)
        if value[:1] in ("[", "{", '"', "'"):
            node = parse(value, "command line") or node
        given[name] = Given(node, "command line", layer, Path.cwd())


def _settle_length(given: dict[str, Given]) -> None:
    """train.steps and train.epochs say the same thing: the one set in the later layer counts, the other is null."""
    steps, epochs = given.get("train.steps"), given.get("train.epochs")
    if steps is None or epochs is None or steps.layer == epochs.layer:
        return
    winner, loser = ("train.steps", "train.epochs") if steps.layer > epochs.layer else ("train.epochs", "train.steps")
    node = given[winner].node
    if not (isinstance(node, Scalar) and node.is_null):
        given[loser] = Given(Scalar("null", node.line), given[winner].source, given[winner].layer, Path.cwd())


def _build(model: type[RunConfig], given: Mapping[str, Given], problems: list[str]) -> RunConfig:
    keys = keys_of(model)
    values: dict[str, Any] = {}
    for name, value in given.items():
        try:
            converted = convert(value.node, keys[name].field.annotation)
            values[name] = _resolve(converted, value.folder, keys[name]) if keys[name].is_path else converted
        except MismatchError as error:
            hint = f" ({error})" if str(error) else ""
            problems.append(
                f"{value.source}: {name} is {show(value.node)}, but {keys[name].expected} is expected{hint}."
            )
    for name, key in keys.items():
        if key.is_path and name not in given and key.field.default is not None:
            values[name] = _resolve(key.field.default, Path.cwd(), key)
    if problems:
        raise ConfigError("\n".join(problems))
    try:
        return model.model_validate(_nested(values))
    except ValidationError as error:
        raise ConfigError("\n".join(dict.fromkeys(_explain(entry, given, keys) for entry in error.errors()))) from None


def _explain(entry: Any, given: Mapping[str, Given], keys: Mapping[str, Key]) -> str:
    """A message of the models in our words."""
    place = [str(part) for part in entry["loc"]]
    # A union or list adds parts of its own behind the key's name.
    name = next((".".join(place[:end]) for end in range(len(place), 0, -1) if ".".join(place[:end]) in keys), "")
    source = f"{given[name].source}: " if name in given else ""
    if entry["type"] == "value_error":
        return source + str(entry["ctx"]["error"])
    if not name:
        return f"{'.'.join(place)} is missing." if entry["type"] == "missing" else str(entry["msg"])
    if entry["type"] == "string_pattern_mismatch" and name != "name":
        return f"{source}{name} is {entry['input']!r}, but must match {entry['ctx']['pattern']}."
    if entry["type"] == "string_pattern_mismatch":
        return f"{source}{name} is '{entry['input']}', but only letters, digits, '.', '_' and '-' are allowed."
    shown = show(given[name].node) if name in given else entry["input"]
    return f"{source}{name} is {shown}, but {keys[name].expected} is expected."


def _resolve(value: Any, folder: Path, key: Key) -> Any:
    if isinstance(value, list):
        return [_resolve(item, folder, key) for item in value]
    if value is None or str(value) == "synthetic" or str(value).startswith("hub:"):
        return value
    text = os.path.expanduser(_VARIABLE.sub(lambda match: _variable(match, key), str(value)))
    path = Path(os.path.normpath(folder / text))
    if key.extra.get("hub_name") and not path.exists() and not text.startswith((".", "/")):
        return value  # the name of a model on a hub
    return type(value)(path)


def _variable(match: re.Match[str], key: Key) -> str:
    name = match[1].strip("{}")
    if name not in os.environ:
        raise ConfigError(f"{key.name} uses ${name}, but that variable is not set.")
    return os.environ[name]


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in values.items():
        *groups, last = name.split(".")
        place = tree
        for group in groups:
            place = place.setdefault(group, {})
        place[last] = value
    return tree


def _as_node(value: Any) -> Node:
    node = parse(as_yaml(value), "config")
    assert node is not None
    return node


def _shown(path: Path) -> str:
    """Relative to the working directory where the file lies below it."""
    absolute = path.absolute()
    return str(absolute.relative_to(Path.cwd())) if absolute.is_relative_to(Path.cwd()) else str(absolute)
