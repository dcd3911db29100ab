"""From a source's classes or probabilities to the model's labels, targets and kinds of defect. Torch-free."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dist_train.errors import ConfigError, DataError
from recipes.defect_detection.config import DataConfig
from recipes.defect_detection.listing import Row

GOOD, DEFECTIVE = "good", "defective"
_CALLED_GOOD = ("good", "ok", "okay", "free", "normal", "no_defect", "non_defective", "clean", "pass")
_MOST_NAMES = 20


@dataclass(frozen=True)
class Labels:
    names: list[str]
    good: str | None
    """The source's class of good parts."""
    labels: np.ndarray
    """[n] int32, index into the names."""
    targets: np.ndarray
    """[n, names] float32."""
    types: list[str]
    """Kind of defect of each image; "" for good parts."""
    warnings: list[str]


def choose_labels(rows: Sequence[Row], kinds: Sequence[str] | None, good: str | None, data: DataConfig) -> Labels:
    """kinds: of generated images. good: the class of good parts where the source knows it. ConfigError, DataError."""
    if data.labels_are == "probabilities" and kinds is None and good is None:
        return _from_probabilities(np.array([row.probability for row in rows]), data)
    classes = [row.label for row in rows] if kinds is None else [kind or GOOD for kind in kinds]
    counts = collections.Counter(classes)
    good = _good_class(counts, good, data)
    folded = collections.Counter(name.casefold() for name in counts)
    alike = sorted(name for name in counts if folded[name.casefold()] > 1)
    warnings = [f"classes that differ in case alone count as different: {_some(alike)}"] if alike else []
    types = ["" if name == good else name for name in classes]
    if data.target == "defective":
        labels = np.array([kind != "" for kind in types], dtype=np.int32)
        if not (labels == 0).any():
            raise DataError(f"no image is of the class {good!r}, that of good parts: {_some(sorted(counts))}.")
        return Labels([GOOD, DEFECTIVE], good, labels, np.eye(2, dtype=np.float32)[labels], types, warnings)
    names = sorted(counts, key=lambda name: (name != good, name))
    if len(names) < 2:
        raise DataError(
            f"all images are of the class {names[0]!r}, but data.target is classes, which needs two at least; where "
            "there are good parts alone set data.target=defective.",
            "data.target",
        )
    code = {name: index for index, name in enumerate(names)}
    labels = np.array([code[name] for name in classes], dtype=np.int32)
    return Labels(names, good, labels, np.eye(len(names), dtype=np.float32)[labels], types, warnings)


def _from_probabilities(probability: np.ndarray, data: DataConfig) -> Labels:
    labels = (probability >= data.defective_from).astype(np.int32)
    targets = np.stack([1 - probability, probability], axis=1).astype(np.float32)
    if not (labels == 0).any():
        raise DataError(
            f"no image has a probability below data.defective_from ({data.defective_from}): none is good.",
            "data.defective_from",
        )
    types = [DEFECTIVE if label else "" for label in labels.tolist()]
    return Labels([GOOD, DEFECTIVE], GOOD, labels, targets, types, [])


def _good_class(counts: collections.Counter[str], known: str | None, data: DataConfig) -> str | None:
    asked = data.good_label
    if known is not None:
        return known
    if asked is not None:
        if asked not in counts:
            raise ConfigError(
                f"data.good_label is {asked!r}, but no image is of this class; there are: {_some(sorted(counts))}.",
                "data.good_label",
            )
        return asked
    found = [name for name in counts if name.casefold().replace("-", "_").replace(" ", "_") in _CALLED_GOOD]
    if len(found) == 1 or (data.target == "classes" and not found):
        return found[0] if found else None
    if found:
        raise ConfigError(
            f"several classes are called like good parts: {_some(sorted(found))}. Set data.good_label to one of them.",
            "data.good_label",
        )
    hint = ""
    if all(_is_share(name) for name in counts):
        hint = " These look like probabilities of a defect: then set data.labels_are=probabilities."
    raise ConfigError(
        f"which class are good parts? None is called {', '.join(_CALLED_GOOD)}; there are: {_some(sorted(counts))}.\n"
        f"Name it with data.good_label=NAME, or set data.target=classes to tell all of them apart.{hint}",
        "data.good_label",
        "data.target",
    )


def _is_share(text: str) -> bool:
    try:
        return 0.0 <= float(text) <= 1.0
    except ValueError:
        return False


def _some(names: list[str]) -> str:
    return ", ".join(map(repr, names[:_MOST_NAMES])) + (" …" if len(names) > _MOST_NAMES else "")
