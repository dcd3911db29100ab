"""What a config's keys are and what each may hold, in words; a YAML value becomes a value of the declared type."""

from __future__ import annotations

import difflib
import functools
import re
import types
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from dist_train.config import Section
from dist_train.yaml_data import Node, Scalar, Sequence, Table

_WHOLE = re.compile(r"[-+]?(0|[1-9]\d*(_\d+)*)")
_NUMBER = re.compile(r"[-+]?(\d+(_\d+)*(\.\d*)?|\.\d+)([eE][-+]?\d+)?")
_MOST_DIGITS = 19  # those of a 64-bit number
_YES_NO = {"on": "true", "yes": "true", "y": "true", "off": "false", "no": "false", "n": "false"}


class MismatchError(Exception):
    """The value is not of the declared type; the text, maybe empty, says what to write instead."""


@dataclass(frozen=True)
class Key:
    """One setting."""

    name: str
    """Dotted, for example train.global_batch_size."""
    field: FieldInfo

    @property
    def extra(self) -> dict[str, Any]:
        extra = self.field.json_schema_extra
        return dict(extra) if isinstance(extra, dict) else {}

    @property
    def is_path(self) -> bool:
        return self.extra.get("format") == "path"

    @property
    def expected(self) -> str:
        """What the key may hold, in words."""
        return str(self.extra.get("expected") or describe(self.field.annotation, self.field.metadata))


@functools.cache
def keys_of(model: type[Section]) -> dict[str, Key]:
    """Every setting below `model` by its dotted name, in the order of the sections."""
    keys: dict[str, Key] = {}
    for name, field in model.model_fields.items():
        section = section_type(field)
        if section is None:
            keys[name] = Key(name, field)
        else:
            keys.update({f"{name}.{key}": Key(f"{name}.{key}", inner.field) for key, inner in keys_of(section).items()})
    return keys


@functools.cache
def sections_of(model: type[Section]) -> dict[str, type[Section]]:
    """Every section below `model` by its dotted name."""
    sections: dict[str, type[Section]] = {}
    for name, field in model.model_fields.items():
        section = section_type(field)
        if section is not None:
            sections[name] = section
            sections.update({f"{name}.{inner}": kind for inner, kind in sections_of(section).items()})
    return sections


def section_type(field: FieldInfo) -> type[Section] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def nearest_keys(given: str, known: Iterable[str]) -> list[str]:
    """The known keys that `given` most likely means: its last word in another section, else the nearest spelling."""
    known = list(known)
    word = given.rpartition(".")[2]
    elsewhere = [key for key in known if key.rpartition(".")[2] == word]
    if elsewhere:
        return difflib.get_close_matches(given, elsewhere, n=3, cutoff=0.0)
    scored = []
    for key in known:
        group, _, last = key.rpartition(".")
        likeness = difflib.SequenceMatcher(None, word, last).ratio()
        if last.replace("_", "").startswith(word.replace("_", "")):
            likeness = max(likeness, 0.9)
        if group != given.rpartition(".")[0]:
            # A group that both share says nothing; one that is misspelt does.
            likeness = max(likeness - 0.05, difflib.SequenceMatcher(None, given, key).ratio())
        scored.append((likeness, key))
    score, best = max(scored, default=(0.0, ""))
    return [best] if score >= 0.7 else []


def convert(node: Node, annotation: Any) -> Any:
    """`node` as a value of the declared type. MismatchError if it is none; ranges are left to the model."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return convert(node, get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return _convert_union(node, get_args(annotation))
    if origin in (list, tuple):
        return _convert_list(node, get_args(annotation)[0], origin)
    if origin is dict:
        if not isinstance(node, Table):
            raise MismatchError
        return {entry.key: convert(entry.value, get_args(annotation)[1]) for entry in node.entries}
    if not isinstance(node, Scalar):
        raise MismatchError
    if node.is_null:
        raise MismatchError(f'write "{node.text}" in quotes for the word' if node.text and annotation is str else "")
    if origin is Literal:
        return _convert_literal(node, get_args(annotation))
    return _convert_scalar(node, annotation)


def _convert_union(node: Node, members: tuple[Any, ...]) -> Any:
    if type(None) in members and isinstance(node, Scalar) and node.is_null:
        return None
    # Every text is a str, so the other members are tried first.
    others = [member for member in members if member is not type(None)]
    hints = []
    # A bare value from the command line is one value where one is allowed: a file name may hold commas.
    lists_last = isinstance(node, Scalar)
    for member in sorted(others, key=lambda kind: (lists_last and get_origin(kind) is list, kind is str)):
        try:
            return convert(node, member)
        except MismatchError as error:
            hints.append(str(error))
    raise MismatchError(next(filter(None, hints), ""))


def _convert_list(node: Node, item: Any, kind: type) -> Any:
    if isinstance(node, Sequence):
        return kind(convert(entry, item) for entry in node.items)
    if isinstance(node, Scalar) and node.typed and not node.is_null:
        return kind(convert(Scalar(part.strip(), node.line), item) for part in node.text.split(","))
    if isinstance(node, Scalar) and not node.is_null:
        raise MismatchError(f"write [{node.text}]")
    raise MismatchError


def _convert_literal(node: Scalar, allowed: tuple[Any, ...]) -> Any:
    for value in allowed:
        if node.text == str(value) and (node.plain or isinstance(value, str)):
            return value
    near = difflib.get_close_matches(node.text.lower(), [str(value) for value in allowed], n=1)
    raise MismatchError(f"did you mean {near[0]}?" if near else "")


def _convert_scalar(node: Scalar, kind: Any) -> Any:
    text = node.text
    if kind in (str, Path):
        return kind(text)
    if kind is bool:
        if node.plain and text in ("true", "false"):
            return text == "true"
        word = _YES_NO.get(text.lower(), text.lower())
        raise MismatchError(f"write {word}" if word in ("true", "false") else "")
    pattern = {int: _WHOLE, float: _NUMBER}.get(kind)
    if pattern is None:
        raise TypeError(f"settings of the type {kind} are not supported")
    if pattern.fullmatch(text) and node.plain:
        if kind is int and len(text.strip("+-")) > _MOST_DIGITS + text.count("_"):
            raise MismatchError
        return kind(text)
    if not node.plain and pattern.fullmatch(text):
        raise MismatchError("leave out the quotes")
    if kind is int and _NUMBER.fullmatch(text) and float(text).is_integer():
        raise MismatchError(f"write {int(float(text))}")
    raise MismatchError


def describe(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    """What a declared type allows, in words."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return describe(arguments[0], _constraints(arguments[1:]))
    metadata = _constraints(metadata)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(member, metadata if member is not type(None) else ()) for member in arguments)
    if origin is Literal:
        words = [str(value) for value in arguments]
        return f"one of {', '.join(words)}" if len(words) > 1 else words[0]
    if origin in (list, tuple):
        return f"a list, each entry {describe(arguments[0])}" + _bounds(metadata)
    if origin is dict:
        return f"a group of keys, each with {describe(arguments[1])}"
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", Path: "a path"}
    return names.get(annotation, "null" if annotation is type(None) else str(annotation)) + _bounds(metadata)


def _constraints(metadata: Iterable[Any]) -> list[Any]:
    """Flatten pydantic's Field(gt=…, lt=…), which holds several constraints in one object."""
    flat: list[Any] = []
    for item in metadata:
        flat.extend(item.metadata if isinstance(item, FieldInfo) else [item])
    return flat


def _bounds(metadata: Iterable[Any]) -> str:
    words = {"gt": "above {}", "ge": "of at least {}", "lt": "below {}", "le": "of at most {}"}
    words |= {"multiple_of": "divisible by {}", "min_length": "at least {} long", "max_length": "at most {} long"}
    found = []
    for item in metadata:
        for name, phrase in words.items():
            bound = getattr(item, name, None)
            if bound is not None:
                found.append(phrase.format(f"{bound:g}" if isinstance(bound, float) else bound))
    return f" {' and '.join(found)}" if found else ""


def show(node: Node, longest: int = 60) -> str:
    """What was given, short enough for a message."""
    if isinstance(node, Table):
        return f"a group of keys ({', '.join(entry.key for entry in node.entries)})"
    if isinstance(node, Sequence):
        text = f"[{', '.join(show(item) for item in node.items)}]"
    elif node.plain and (node.is_null or _NUMBER.fullmatch(node.text)):
        text = node.text or "empty"
    else:
        text = f"'{node.text}'" if node.plain else f'"{node.text}"'
    text = "".join(character if character.isprintable() else " " for character in text)
    return text if len(text) <= longest else f"{text[: longest - 1]}…"
