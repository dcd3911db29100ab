"""Who trains, who validates, who tests: stratified or by time, with near-duplicates on one side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from dist_train.errors import DataError
from recipes.ticket_routing.config import DataConfig
from recipes.ticket_routing.groups import BLOCK_ROWS, Grouped

TRAIN, VALIDATION, TEST, DROPPED = 0, 1, 2, 3
NAMES = ("train", "validation", "test")
WORDS = {"train": TRAIN, "training": TRAIN, "validation": VALIDATION, "valid": VALIDATION, "val": VALIDATION}
WORDS |= {"dev": VALIDATION, "test": TEST, "eval": TEST}


def stratified(
    labels: np.ndarray, grouped: Grouped, config: DataConfig, places: np.ndarray | None = None
) -> np.ndarray:
    """The split of each row: [n] int8. A group goes as a whole, filed under its commonest label.

    Within a label the groups come in a random order of `split_seed`, larger ones first among those that would not fit
    at the end, and each goes where most rows are still wanted. Block after block, so that rows that are appended leave
    the whole blocks before them as they are: a group that began in an earlier block goes where it went, and what a
    label lacks is carried on. places: the rows' places in the data, which tell the blocks; by default all of it.
    """
    places = np.arange(len(labels)) if places is None else places
    result = np.full(len(labels), TRAIN, dtype=np.int8)
    went = np.full(int(grouped.then.max(initial=0)) + 1, -1, dtype=np.int8)
    lacks: dict[int, np.ndarray] = {}
    for block in range(int(places.max(initial=-1)) // BLOCK_ROWS + 1):
        rows = slice(*np.searchsorted(places, [block * BLOCK_ROWS, (block + 1) * BLOCK_ROWS]))
        # Block 0 draws as all of the data did when there were no blocks.
        generator = np.random.Generator(np.random.Philox(key=config.split_seed + (block << 64)))
        result[rows] = _deal(labels[rows], grouped.then[rows], went, lacks, config, generator)
    return result if len(places) <= BLOCK_ROWS else _one_side(result, grouped.groups)


def _deal(
    labels: np.ndarray,
    groups: np.ndarray,
    went: np.ndarray,
    lacks: dict[int, np.ndarray],
    config: DataConfig,
    generator: np.random.Generator,
) -> np.ndarray:
    """The split of one block's rows. went: the split of each group so far, or -1; lacks: rows that each label still
    wants in each split. Both go on to the next block."""
    shares = np.array([1 - config.validation_share - config.test_share, config.validation_share, config.test_share])
    members, starts = _members(groups)
    sizes, names = np.diff(starts), groups[members[starts[:-1]]]
    label_of = _commonest(labels, members, starts)
    sides = went[names]
    known = sides >= 0
    for label in np.unique(label_of).tolist():
        every = label_of == label
        own = np.flatnonzero(every & ~known)
        own = own[generator.permutation(len(own))]
        own = own[np.argsort(-sizes[own], kind="stable")]
        wanted = shares * sizes[every].sum() + lacks.get(label, 0.0)
        wanted -= np.bincount(sides[every & known], weights=sizes[every & known], minlength=len(shares))
        sides[own], lacks[label] = _deal_label(sizes[own].tolist(), wanted, shares)
    went[names] = sides
    result = np.empty(len(labels), dtype=np.int8)
    result[members] = np.repeat(sides, sizes)
    # Rows of one size were dealt out in turns; a shuffle of the rows that are alone makes the turns random.
    single = np.zeros(len(labels), dtype=bool)
    single[members[starts[:-1]][(sizes == 1) & ~known]] = True
    for label in np.unique(labels):
        own = np.flatnonzero(single & (labels == label))
        result[own] = result[own][generator.permutation(len(own))]
    went[groups[single]] = result[single]
    return result


def _deal_label(sizes: list[int], wanted: np.ndarray, shares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each group goes to the split that lacks the largest part of its share: exact in the long run, whatever the sizes.
    Plain numbers, since arrays of three cost ten times as much."""
    train, validation, test = wanted.tolist()
    of_train, of_validation, of_test = np.maximum(shares, 1e-9).tolist()
    sides = np.empty(len(sizes), dtype=np.int8)
    for index, size in enumerate(sizes):
        first, second, third = train / of_train, validation / of_validation, test / of_test
        if first >= second and first >= third:
            sides[index] = TRAIN
            train -= size
        elif second >= third:
            sides[index] = VALIDATION
            validation -= size
        else:
            sides[index] = TEST
            test -= size
    return sides, np.array([train, validation, test])


def _commonest(labels: np.ndarray, members: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """The commonest label of each group."""
    result = labels[members[starts[:-1]]]
    for group in np.flatnonzero(np.diff(starts) > 1).tolist():
        result[group] = np.bincount(labels[members[starts[group] : starts[group + 1]]]).argmax()
    return result


def _one_side(split_of: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Where a later row has united groups of several splits, all go to the first of these."""
    first = np.full(int(groups.max(initial=0)) + 1, DROPPED, dtype=np.int8)
    np.minimum.at(first, groups, split_of)
    return first[groups]


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


def carve(split_of: np.ndarray, labels: np.ndarray, grouped: Grouped, config: DataConfig, missing: int) -> np.ndarray:
    """A validation or test split out of the training rows, where the user's own split has none."""
    rows = np.flatnonzero(split_of == TRAIN)
    shares = {VALIDATION: config.validation_share, TEST: config.test_share}
    share = min(0.5, shares[missing] / max(1e-9, 1 - shares[VALIDATION + TEST - missing]))
    # Dealt out as a validation split in either case.
    part = config.model_copy(update={"validation_share": share, "test_share": 0.0})
    result = split_of.copy()
    chosen = Grouped(grouped.groups[rows], grouped.then[rows])
    result[rows[stratified(labels[rows], chosen, part, rows) == VALIDATION]] = missing
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
    counts = np.bincount(groups[kept], minlength=1)
    # Rows that are alone, which most are, need no further look.
    rows = np.flatnonzero(kept & (counts[groups] > 1)) if kept.any() else np.zeros(0, dtype=np.int64)
    several, sides = groups[rows].astype(np.int64), split_of[rows]
    crossing = {}
    for first, second in ((TRAIN, VALIDATION), (TRAIN, TEST), (VALIDATION, TEST)):
        shared = np.intersect1d(several[sides == first], several[sides == second])
        crossing[f"{NAMES[first]}-{NAMES[second]}"] = len(shared)
    num_labels = int(labels.max(initial=0)) + 1
    pairs = np.unique(several * num_labels + labels[rows])
    _, labels_in_group = np.unique(pairs // num_labels, return_counts=True)
    return {
        "near_duplicate_groups": int((counts > 1).sum()),
        "near_duplicate_rows": len(rows),
        "largest_group": int(counts.max(initial=0)),
        "groups_with_conflicting_labels": int((labels_in_group > 1).sum()),
        "rows_dropped": int((~kept).sum()),
        "groups_crossing": crossing,
    }
