"""Who trains, who validates, who tests: stratified by class and kind of defect, all images of a part on one side."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from recipes.defect_detection.config import DataConfig
from recipes.defect_detection.listing import SPLITS, TEST, TRAIN, VALIDATION


def group_images(*columns: Sequence[object]) -> np.ndarray:
    """The group of each image: [n] int32. Images that share a value in any of the columns lie in one group, also by way
    of others (part, bytes, pixels)."""
    count = len(columns[0])
    rows, names, first = [], [], count
    for column in columns:
        codes: dict[object, int] = {}
        names.append(np.array([codes.setdefault(value, len(codes)) for value in column], dtype=np.int64) + first)
        rows.append(np.arange(count))
        first += len(codes)
    ends = (np.concatenate(rows), np.concatenate(names))
    links = coo_array((np.ones(len(ends[0]), dtype=np.int8), ends), shape=(first, first))
    return connected_components(links, directed=False)[1][:count]


def split_images(
    strata: np.ndarray, groups: np.ndarray, own: np.ndarray | None, only_test: np.ndarray, config: DataConfig
) -> tuple[np.ndarray, str]:
    """The split of each image, [n] int8, and how it was made.

    own: the source's own split [n], which is respected; what it lacks of validation and test is dealt out of its
    training images. only_test: images that lie in the test split whatever else, with all of their group: [n] bool.
    """
    forced = np.isin(groups, groups[only_test])
    if own is None:
        result = np.full(len(strata), TEST, dtype=np.int8)
        result[~forced] = split_items(strata[~forced], groups[~forced], config)
        return result, "stratified" if config.folds is None else f"fold {config.fold} of {config.folds}"
    result, method = own.astype(np.int8), "given"
    result[forced] = TEST
    shares = {TEST: config.test_share, VALIDATION: config.validation_share}
    for missing, other in ((TEST, VALIDATION), (VALIDATION, TEST)):
        if not (result == missing).any():
            rest = 1 - (shares[other] if (result == other).any() else 0)
            rows = np.flatnonzero(result == TRAIN)
            share = min(0.5, shares[missing] / rest)
            dealt = _deal(strata[rows], groups[rows], [1 - share, share], config.split_seed)
            result[rows[dealt == 1]] = missing
            method += f", {SPLITS[missing]} out of its training images"
    return result, method


def split_items(labels: np.ndarray, groups: np.ndarray, config: DataConfig) -> np.ndarray:
    """The split of each image: [n] int8. labels: class or kind to stratify by, [n]; groups: stay together, [n]."""
    if config.folds is None:
        shares = [1 - config.validation_share - config.test_share, config.test_share, config.validation_share]
        return np.array([TRAIN, TEST, VALIDATION], dtype=np.int8)[_deal(labels, groups, shares, config.split_seed)]
    # The folds do not depend on which of them is the test split.
    folds = _deal(labels, groups, [1 / config.folds] * config.folds, config.split_seed)
    result = np.full(len(labels), TEST, dtype=np.int8)
    rest = np.flatnonzero(folds != config.fold)
    share = config.validation_share / (1 - 1 / config.folds)
    dealt = _deal(labels[rest], groups[rest], [1 - share, share], config.split_seed)
    result[rest] = np.where(dealt == 1, VALIDATION, TRAIN)
    return result


def _deal(strata: np.ndarray, groups: np.ndarray, shares: list[float], seed: int) -> np.ndarray:
    """Which of the shares each image goes to: [n]. A group goes as a whole.

    The groups come in random order, larger ones first, and each goes where the largest part of what it holds is still
    lacking, rare strata before common ones (after Sechidis et al. 2011, Iterative Stratification).
    """
    if not len(strata):
        return np.zeros(0, dtype=np.int64)
    _, codes, counts = np.unique(strata, return_inverse=True, return_counts=True)
    _, members, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    generator = np.random.Generator(np.random.Philox(key=seed))
    sides = np.zeros(len(sizes), dtype=np.int64)
    wanted = np.outer(shares, counts)
    lacking = wanted.copy()
    by_group = np.argsort(members, kind="stable")
    starts = np.concatenate([[0], np.cumsum(sizes)])
    several = np.flatnonzero(sizes > 1)
    several = several[generator.permutation(len(several))]
    holding = np.bincount(codes[sizes[members] == 1], minlength=len(counts))
    for group in several[np.argsort(-sizes[several], kind="stable")].tolist():
        kinds, held = np.unique(codes[by_group[starts[group] : starts[group + 1]]], return_counts=True)
        holding[kinds] += 1
        score = (lacking[:, kinds] / wanted[:, kinds] * (held / counts[kinds])).sum(axis=1)
        sides[group] = score.argmax()
        lacking[sides[group], kinds] -= held
    carried = np.zeros(len(shares))
    for stratum in np.argsort(counts, kind="stable").tolist():
        single = members[(codes == stratum) & (sizes[members] == 1)]
        # In too few groups for all shares: then it depends on what those before got, or all of them would train.
        few = holding[stratum] < len(shares)
        here = (lacking[:, stratum] + (carried if few else 0)).tolist()
        for group in single[generator.permutation(len(single))].tolist():
            side = max(range(len(shares)), key=lambda index: here[index] / shares[index])
            sides[group] = side
            here[side] -= 1
        if few:
            carried = np.array(here)
    return sides[members]


def crossing(values: Sequence[object], split_of: np.ndarray) -> int:
    """How many of the values have rows in more than one split."""
    sides: dict[object, set[int]] = {}
    for value, side in zip(values, split_of.tolist(), strict=True):
        sides.setdefault(value, set()).add(side)
    return sum(len(found) > 1 for found in sides.values())
