"""Who trains, who validates, who tests: stratified or by time, with near-duplicates on one side."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from dist_train.errors import DataError
from recipes.ticket_routing.config import DataConfig

TRAIN, VALIDATION, TEST, DROPPED = 0, 1, 2, 3
NAMES = ("train", "validation", "test")
WORDS = {"train": TRAIN, "training": TRAIN, "validation": VALIDATION, "valid": VALIDATION, "val": VALIDATION}
WORDS |= {"dev": VALIDATION, "test": TEST, "eval": TEST}


def stratified(labels: np.ndarray, groups: np.ndarray, config: DataConfig) -> np.ndarray:
    """The split of each row: [n] int8. A group goes as a whole, filed under its commonest label.

    Within a label the groups come in a random order of `split_seed`, larger ones first among those that would not fit
    at the end, and each goes where most rows are still wanted.
    """
    generator = np.random.Generator(np.random.Philox(key=config.split_seed))
    result = np.full(len(labels), TRAIN, dtype=np.int8)
    shares = np.array([1 - config.validation_share - config.test_share, config.validation_share, config.test_share])
    members, starts = _members(groups)
    sizes = np.diff(starts)
    label_of = np.array([np.bincount(labels[members[a:b]]).argmax() for a, b in itertools.pairwise(starts)])
    for label in np.unique(label_of):
        own = np.flatnonzero(label_of == label)
        own = own[generator.permutation(len(own))]
        own = own[np.argsort(-sizes[own], kind="stable")]
        wanted = shares * sizes[own].sum()
        for group in own:
            # The split that lacks the largest part of its share: exact in the long run, whatever the group sizes.
            split = int(np.argmax(wanted / np.maximum(shares, 1e-9)))
            result[members[starts[group] : starts[group + 1]]] = split
            wanted[split] -= sizes[group]
    # Rows of one size were dealt out in turns; a last shuffle within each label makes the turns random.
    return _shuffle_singles(result, labels, groups, generator)


def _shuffle_singles(
    split_of: np.ndarray, labels: np.ndarray, groups: np.ndarray, generator: np.random.Generator
) -> np.ndarray:
    _, inverse, counts = np.unique(groups, return_inverse=True, return_counts=True)
    single = counts[inverse] == 1
    for label in np.unique(labels):
        own = np.flatnonzero(single & (labels == label))
        split_of[own] = split_of[own][generator.permutation(len(own))]
    return split_of


def _members(groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row indices sorted by group, and where each group starts (one entry more than groups)."""
    order = np.argsort(groups, kind="stable")
    changes = np.flatnonzero(np.diff(groups[order])) + 1
    return order, np.concatenate([[0], changes, [len(groups)]]).astype(np.int64)


def by_time(times: np.ndarray, config: DataConfig) -> np.ndarray:
    """Oldest rows train, newest test; a cut never lies inside a tied time stamp."""
    order = np.argsort(times, kind="stable")
    result = np.full(len(times), TEST, dtype=np.int8)
    ordered = times[order]
    cuts = []
    for share in (config.validation_share + config.test_share, config.test_share):
        place = round(len(times) * (1 - share))
        # Ties go to the later split, so that nothing of the future trains.
        cuts.append(int(np.searchsorted(ordered, ordered[min(place, len(times) - 1)], side="left")))
    result[order[: cuts[1]]] = VALIDATION
    result[order[: cuts[0]]] = TRAIN
    return result


def parse_times(values: Sequence[str | None], rows: Sequence[int], where: str) -> np.ndarray:
    """Numbers or ISO 8601 times to seconds [n] float64. DataError names the first row that is neither.

    rows: the number of each row in the source, for the message.
    """
    result = np.empty(len(values))
    for index, value in enumerate(values):
        try:
            result[index] = _seconds(value or "")
        except ValueError:
            raise DataError(
                f"{where}: row {rows[index]} has the time {value!r}, which is neither a number nor like "
                "2026-01-31T17:45:00. Mend it or set data.time_column to null."
            ) from None
    return result


def _seconds(value: str) -> float:
    from datetime import UTC, datetime

    try:
        seconds = float(value)
    except ValueError:
        parsed = datetime.fromisoformat(value)
        return (parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)).timestamp()
    if not math.isfinite(seconds):
        raise ValueError  # nan, as a missing time is often written, has no place in an order
    return seconds


def by_column(values: Sequence[str | None], rows: Sequence[int], where: str) -> np.ndarray:
    """The split that each row names itself. rows: the number of each row in the source, for the message."""
    result = np.empty(len(values), dtype=np.int8)
    for index, value in enumerate(values):
        split = WORDS.get((value or "").strip().lower())
        if split is None:
            raise DataError(
                f"{where}: row {rows[index]} has the split {value!r}; allowed are train, validation and test. "
                "Change the file or data.split_column."
            )
        result[index] = split
    return result


def carve(split_of: np.ndarray, labels: np.ndarray, groups: np.ndarray, config: DataConfig, missing: int) -> np.ndarray:
    """A validation or test split out of the training rows, where the user's own split has none."""
    rows = np.flatnonzero(split_of == TRAIN)
    shares = {VALIDATION: config.validation_share, TEST: config.test_share}
    share = min(0.5, shares[missing] / max(1e-9, 1 - shares[VALIDATION + TEST - missing]))
    # Dealt out as a validation split in either case.
    part = config.model_copy(update={"validation_share": share, "test_share": 0.0})
    result = split_of.copy()
    result[rows[stratified(labels[rows], groups[rows], part) == VALIDATION]] = missing
    return result


def drop_later_copies(split_of: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Evaluation rows whose near-duplicate lies in an earlier split leave the evaluation."""
    result = split_of.copy()
    for split in (VALIDATION, TEST):
        earlier = groups[result < split]
        result[(result == split) & np.isin(groups, earlier)] = DROPPED
    return result


def leak_report(split_of: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> dict[str, Any]:
    """Counts of near-duplicates, and of those that still lie on both sides of a cut."""
    kept = split_of != DROPPED
    _, inverse, counts = np.unique(groups[kept], return_inverse=True, return_counts=True)
    in_group = counts[inverse] > 1
    crossing = {}
    for first, second in ((TRAIN, VALIDATION), (TRAIN, TEST), (VALIDATION, TEST)):
        shared = np.intersect1d(groups[split_of == first], groups[split_of == second])
        crossing[f"{NAMES[first]}-{NAMES[second]}"] = len(shared)
    pairs = np.unique(np.stack([groups[kept], labels[kept].astype(np.int64)]), axis=1)
    _, labels_in_group = np.unique(pairs[0], return_counts=True)
    return {
        "near_duplicate_groups": int((counts > 1).sum()),
        "near_duplicate_rows": int(in_group.sum()),
        "largest_group": int(counts.max(initial=0)),
        "groups_with_conflicting_labels": int((labels_in_group > 1).sum()),
        "rows_dropped": int((~kept).sum()),
        "groups_crossing": crossing,
    }
