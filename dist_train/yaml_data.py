"""Read YAML as plain data: a small tree that keeps the line and the raw text of each value.

Tags, anchors and aliases are refused, so that a file can name no class and no small file can grow into a large one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from dist_train.errors import ConfigError, UnsafeInputError

MAX_BYTES = 1 << 20
MAX_DEPTH = 32

# What YAML allows in a stream; searched here because the parsers give no line for what is outside it.
_NOT_PRINTABLE = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]")
_NULLS = ("", "~", "null", "Null", "NULL")


@dataclass(frozen=True)
class Scalar:
    text: str
    line: int
    plain: bool = True
    """False for a quoted or block scalar, which is always a text."""
    typed: bool = False
    """True for a value from the command line that was written without quotes and brackets."""

    @property
    def is_null(self) -> bool:
        return self.plain and self.text in _NULLS


@dataclass(frozen=True)
class Sequence:
    items: tuple[Node, ...]
    line: int


@dataclass(frozen=True)
class Entry:
    key: str
    line: int
    """Line of the key."""
    value: Node


@dataclass(frozen=True)
class Table:
    """A mapping in the order of the file, each key once."""

    entries: tuple[Entry, ...]
    line: int


Node = Scalar | Sequence | Table


def read_file(path: Path, shown: str) -> Table:
    """The mapping in a YAML file, empty for an empty file; `shown` names the file in messages.

    ConfigError with file and line for what is no YAML mapping, UnsafeInputError for what is more than plain data.
    """
    content = read_beginning(path, shown)
    refuse_large(content, shown)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{shown}:{line}: the byte 0x{content[error.start]:02x} is not UTF-8: save the file as UTF-8."
        ) from error
    tree = parse(text, shown)
    if tree is None or (isinstance(tree, Scalar) and tree.is_null):
        return Table((), 1)
    if not isinstance(tree, Table):
        kind = "a list" if isinstance(tree, Sequence) else "a single value"
        raise ConfigError(f"{shown}:{tree.line}: a config file holds `key: value` lines, but this one holds {kind}.")
    return tree


def read_beginning(path: Path, shown: str) -> bytes:
    """The file, or as much of it as tells that it is too large. ConfigError when it cannot be read."""
    if not path.is_file():
        raise ConfigError(f"{shown} cannot be read: {'it is a folder' if path.is_dir() else 'there is no such file'}.")
    try:
        with open(path, "rb") as stream:
            return stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{shown} cannot be read: {error.strerror or error}.") from error


def refuse_large(content: bytes, shown: str) -> None:
    if len(content) > MAX_BYTES:
        raise UnsafeInputError(f"{shown} is larger than {MAX_BYTES >> 20} MiB, which no config file needs.")


def parse(text: str, shown: str) -> Node | None:
    """The tree of the one YAML document in `text`; None if it holds nothing."""
    odd = _NOT_PRINTABLE.search(text)
    if odd is not None:
        line = text.count("\n", 0, odd.start()) + 1
        raise ConfigError(f"{shown}:{line}: the character U+{ord(odd.group()):04X} is not allowed in YAML.")
    # libyaml is 20 times faster than the Python parser, which matters for a file of a megabyte of nonsense.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        return _document(yaml.parse(text, Loader=loader), shown)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark is not None else 1
        raise ConfigError(f"{shown}:{line}: this is not valid YAML: {error.problem or error.context}.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{shown}: this is not valid YAML: {error}.") from error


def _document(events: Iterator[yaml.Event], shown: str) -> Node | None:
    root: Node | None = None
    for event in events:
        if isinstance(event, yaml.DocumentStartEvent):
            if root is not None:
                raise ConfigError(f"{shown}:{_line(event)}: a config file holds one document, but here begins another.")
            root = _node(next(events), events, shown, 0)
    return root


def _node(event: yaml.Event, events: Iterator[yaml.Event], shown: str, depth: int) -> Node:
    line = _line(event)
    if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
        raise UnsafeInputError(
            f"{shown}:{line}: anchors (&name) and aliases (*name) are refused, because a small file can grow without "
            "bounds with them: write the value out, or put it in quotes if it is a text."
        )
    if getattr(event, "tag", None) is not None:
        raise UnsafeInputError(
            f"{shown}:{line}: the tag {getattr(event, 'tag', '')} is refused: config files hold plain data. "
            "Leave the tag out, or put the value in quotes if it is a text."
        )
    if depth > MAX_DEPTH:
        raise UnsafeInputError(f"{shown}:{line}: more than {MAX_DEPTH} levels lie in each other.")
    if isinstance(event, yaml.ScalarEvent):
        return Scalar(_clean(event.value, f"{shown}:{line}"), line, plain=event.style in (None, ""))
    if isinstance(event, yaml.SequenceStartEvent):
        return Sequence(tuple(_items(events, shown, depth)), line)
    return _table(events, shown, depth, line)


def _items(events: Iterator[yaml.Event], shown: str, depth: int) -> Iterator[Node]:
    for event in events:
        if isinstance(event, yaml.SequenceEndEvent):
            return
        yield _node(event, events, shown, depth + 1)


def _table(events: Iterator[yaml.Event], shown: str, depth: int, line: int) -> Table:
    entries: dict[str, Entry] = {}
    for event in events:
        if isinstance(event, yaml.MappingEndEvent):
            break
        key = _node(event, events, shown, depth + 1)
        value = _node(next(events), events, shown, depth + 1)
        if not isinstance(key, Scalar):
            raise ConfigError(f"{shown}:{key.line}: a key must be a single word, not a list or a group of keys.")
        if key.text == "<<":
            raise ConfigError(f"{shown}:{key.line}: merge keys (<<) are not known here: `extends:` builds on a file.")
        if key.text in entries:
            raise ConfigError(
                f"{shown}:{key.line}: the key {key.text} stands twice in one group, first in line "
                f"{entries[key.text].line}: keep one."
            )
        entries[key.text] = Entry(key.text, key.line, value)
    return Table(tuple(entries.values()), line)


def _clean(text: str, where: str) -> str:
    """`text`, unless an escape made a character of it that no file name and no UTF-8 file can hold."""
    for character in text:
        if character == "\0" or "\ud800" <= character <= "\udfff":
            raise ConfigError(f"{where}: the character U+{ord(character):04X} cannot be part of a setting.")
    return text


def _line(event: yaml.Event) -> int:
    mark = event.start_mark
    return mark.line + 1 if mark is not None else 1
