"""A source's images as a list, before any of them is read: labels, parts, splits, masks, and what is wrong with it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from dist_train.errors import ConfigError, DataError
from recipes.defect_detection.config import DataConfig

NO_SPLIT, TRAIN, VALIDATION, TEST = -1, 0, 1, 2
SPLITS = ("train", "validation", "test")
WORDS = {"train": TRAIN, "training": TRAIN, "validation": VALIDATION, "valid": VALIDATION, "val": VALIDATION}
WORDS |= {"dev": VALIDATION, "test": TEST, "testing": TEST, "eval": TEST}
MOST_SHOWN = 20


class Row(NamedTuple):
    """An image."""

    id: str
    """Path below the folder, or as the table names it."""
    file: str
    """Where it lies; "" within a data set, or generated."""
    label: str
    """Its class; "" where the label is a probability."""
    probability: float
    """Of a defect; NaN where the label is a class."""
    item: str
    """The part that it shows."""
    split: int = NO_SPLIT
    mask: str = ""
    """File of its mask, or the outlines in it as JSON, an object; "" without one."""


Payload = tuple[Any, Any]
"""What a worker reads an image and its mask from: a path, the bytes of a file, outlines as JSON, or None."""


@dataclass
class Listing:
    where: str
    rows: list[Row]
    described: dict[str, Any]
    """What tells this source's content from another's, beside the content of its files."""
    problems: list[str] = field(default_factory=list)
    """What is wrong, each with the image, file or row that it is wrong with."""
    warnings: list[str] = field(default_factory=list)
    good: str | None = None
    """The class of good parts, where the kind of source says so itself."""
    has_masks: bool = False
    generated: bool = False
    """Labels and masks come with the images, from the generator."""
    load: Callable[[int, int], list[Payload]] | None = None
    """Reads the payloads of rows from a data set; None: they are the rows' own files."""

    def payloads(self, start: int, stop: int) -> list[Payload]:
        if self.load is not None:
            return self.load(start, stop)
        return [(row.file, row.mask or None) for row in self.rows[start:stop]]


def raise_problems(problems: list[str], where: str, advice: str = "") -> None:
    """DataError that names the first of them and says how many there are; nothing for none."""
    if not problems:
        return
    shown = "\n".join(f"  {problem}" for problem in problems[:MOST_SHOWN])
    more = f"\n  and {len(problems) - MOST_SHOWN} more" if len(problems) > MOST_SHOWN else ""
    count = f"{len(problems)} problems" if len(problems) > 1 else "a problem"
    raise DataError(f"{where} has {count}:\n{shown}{more}{advice}")


class Items:
    """Finds the part in a file's name (data.item_pattern)."""

    def __init__(self, data: DataConfig) -> None:
        self._pattern = re.compile(data.item_pattern) if data.item_pattern is not None else None
        self._missed: list[str] = []
        self._found = 0

    def of(self, identifier: str, name: str) -> str:
        """name: of the file, without folders. An image whose name does not tell is a part of its own."""
        if self._pattern is None:
            return identifier
        match = self._pattern.search(name)
        if match is None or match[1] is None:
            self._missed.append(identifier)
            return identifier
        self._found += 1
        return match[1]

    def check(self, data: DataConfig) -> list[str]:
        """Warnings. ConfigError where the pattern fits no name."""
        if not self._missed:
            return []
        if not self._found:
            raise ConfigError(
                f"data.item_pattern is {data.item_pattern!r}, which fits the name of no image, for example not "
                f"{self._missed[0]}: mend it, or set it to null.",
                "data.item_pattern",
            )
        return [f"data.item_pattern fits the names of all but {counted(self._missed)}: each of these is its own part"]


def counted(names: list[str], what: str = "images") -> str:
    """`3 images, the first a.png`"""
    singular = what.removesuffix("s")
    return f"1 {singular}, {names[0]}" if len(names) == 1 else f"{len(names)} {what}, the first {names[0]}"


def find_repeated(names: list[str]) -> list[str]:
    """Those that are there more than once."""
    return [name for name, count in Counter(names).items() if count > 1]


def split_of(word: str | None) -> int | None:
    return WORDS.get((word or "").strip().lower())
