"""Ranking metrics from where targets stood, in expectation over the order of items that score alike. Torch-free."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from scipy.special import digamma, gammaln

from recipes.recsys.predictions import fixed_lists, header_of, ragged

FREQUENCIES = ((0, 0, "0"), (1, 5, "1-5"), (6, 20, "6-20"), (21, None, "over 20"))
"""Training events of a target: from, to, and how the bucket is called."""
HISTORIES = ((0, 0, "0"), (1, 1, "1"), (2, 5, "2-5"), (6, 20, "6-20"), (21, None, "over 20"))
_MOST_PERIODS = 26


class Ranks(NamedTuple):
    """Targets of all rows side by side."""

    above: np.ndarray
    """[targets] items that score higher."""
    tied: np.ndarray
    """[targets] items that score the same, the target among them; 0: the target could not be recommended."""
    row: np.ndarray
    """[targets] rising."""
    rows: int


def ndcg(ranks: Ranks, k: int) -> np.ndarray:
    """Normalised discounted cumulative gain of the first k places, of each row (Järvelin and Kekäläinen 2002)."""
    ideal = _discounts(k)[np.minimum(_targets_of(ranks), k)]
    return _sum(ranks, target_gain(ranks.above, ranks.tied, k)) / np.maximum(ideal, 1e-12)


def target_gain(above: np.ndarray, tied: np.ndarray, k: int) -> np.ndarray:
    """1 / log2(1 + rank) of each target, 0 beyond k, in expectation: the NDCG of a target alone."""
    return _mean_within(_discounts(k), above, tied, k)


def target_hit(above: np.ndarray, tied: np.ndarray, k: int) -> np.ndarray:
    """Probability that each target is among the first k."""
    return _mean_within(np.arange(k + 1.0), above, tied, k)


def hit_rate(ranks: Ranks, k: int) -> np.ndarray:
    """Probability that one of the row's targets is among the first k."""
    above, tied, count = _first_group(ranks)
    outside = tied - np.clip(k - above, 0, tied)
    # All of the group's targets miss the places that are inside: C(outside, count) / C(tied, count).
    possible = outside >= count
    of_all = np.maximum(tied, count)
    missed = np.exp(_log_choose(np.where(possible, outside, of_all), count) - _log_choose(of_all, count))
    return np.where(tied > 0, 1 - np.where(possible, missed, 0), 0.0)


def mrr(ranks: Ranks) -> np.ndarray:
    """1 / rank of the row's first target, over the whole catalogue."""
    above, tied, count = _first_group(ranks)
    alone = _harmonic(above + tied) - _harmonic(above)
    values = np.divide(alone, tied, out=np.zeros(ranks.rows), where=tied > 0)
    for row in np.flatnonzero((count > 1) & (tied > 0)).tolist():
        places = np.arange(1, tied[row] - count[row] + 2)
        share = np.exp(_log_choose(tied[row] - places, count[row] - 1) - _log_choose(tied[row], count[row]))
        values[row] = np.sum(share / (above[row] + places))
    return values


def average_precision(ranks: Ranks, k: int) -> np.ndarray:
    """Mean over the row's targets of the precision at each, 0 beyond k; over at most k targets."""
    numbers = _targets_of(ranks)
    alone = _mean_within(np.append(0.0, np.cumsum(1 / np.arange(1.0, k + 1))), ranks.above, ranks.tied, k)
    values = _sum(ranks, alone)
    starts = np.searchsorted(ranks.row, np.arange(ranks.rows + 1))
    for row in np.flatnonzero(numbers > 1).tolist():
        part = slice(starts[row], starts[row + 1])
        values[row] = _several(ranks.above[part], ranks.tied[part], k) / min(int(numbers[row]), k)
    return values


def _several(above: np.ndarray, tied: np.ndarray, k: int) -> float:
    """Expected sum over the targets of (targets up to it) / rank."""
    total = 0.0
    for start in np.unique(above[(tied > 0) & (above < k)]).tolist():
        group = (above == start) & (tied > 0)
        size, count = int(tied[group][0]), int(group.sum())
        places = np.arange(1, min(size, k - start) + 1)
        before = int(((above < start) & (tied > 0)).sum())
        # Of the other targets of the group each lies before this one with the share of places that are before it.
        others = (count - 1) * (places - 1) / max(size - 1, 1)
        total += count / size * float(np.sum((1 + before + others) / (start + places)))
    return total


def measure_lists(table: pa.Table) -> Callable[[np.ndarray], dict[str, float]]:
    """All metrics of a predictions table, as a function of row weights.

    ndcg, map and hit_rate look at the first k; mrr at the whole catalogue. novelty: mean of -log2 of a recommended
    item's share of the training events; popularity_lift: how many times as many training events a recommended item has
    as a target. By groups: frequency (training events of the target; each target counts alone), history (events before
    it), user and age.
    """
    k = header_of(table).k
    ranks = ranks_of(table)
    best = fixed_lists(table, "best")[:, :k] > 0
    best_count = fixed_lists(table, "best_count")[:, :k]
    target_count, _ = ragged(table, "target_count")
    rows = {
        "ndcg": ndcg(ranks, k),
        "map": average_precision(ranks, k),
        "hit_rate": hit_rate(ranks, k),
        "mrr": mrr(ranks),
        "novelty": _novelty(table, best, best_count),
    }
    listed, clicked = _row_mean(best_count, best), _sum(ranks, target_count) / np.maximum(_targets_of(ranks), 1)
    row_groups = _row_groups(table)
    frequency = bucket_of(target_count, FREQUENCIES)
    gains = {"ndcg": target_gain(ranks.above, ranks.tied, k), "hit_rate": target_hit(ranks.above, ranks.tied, k)}

    def values(weights: np.ndarray) -> dict[str, float]:
        total = weights.sum()
        result = {name: float(weights @ each / total) for name, each in rows.items()}
        result["popularity_lift"] = float(weights @ listed / max(weights @ clicked, 1e-12))
        each_target = weights[ranks.row]
        names = [name for _, _, name in FREQUENCIES]
        _add_groups(result, "frequency", names, frequency, each_target, gains)
        for kind, (group_names, group) in row_groups.items():
            _add_groups(result, kind, group_names, group, weights, {"ndcg": rows["ndcg"], "hit_rate": rows["hit_rate"]})
        return result

    return values


def ranks_of(table: pa.Table) -> Ranks:
    above, row = ragged(table, "above")
    tied, _ = ragged(table, "tied")
    return Ranks(above, tied, row, table.num_rows)


def coverage(table: pa.Table) -> float:
    """Share of the catalogue that stands in at least one list."""
    header = header_of(table)
    best = fixed_lists(table, "best")[:, : header.k]
    return len(np.unique(best[best > 0])) / header.items


def bucket_of(counts: np.ndarray, buckets: tuple[tuple[int, int | None, str], ...]) -> np.ndarray:
    return np.searchsorted([low for low, _, _ in buckets], counts, side="right") - 1


def _row_groups(table: pa.Table) -> dict[str, tuple[list[str], np.ndarray]]:
    known = table["is_known_user"].to_numpy(zero_copy_only=False).astype(np.int64)
    groups = {
        "history": ([name for _, _, name in HISTORIES], bucket_of(table["history"].to_numpy(), HISTORIES)),
        "user": (["not in training", "in training"], known),
    }
    if table["age_days"].null_count == 0:
        period = header_of(table).period_days
        age = np.minimum((table["age_days"].to_numpy() // period).astype(np.int64), _MOST_PERIODS - 1)
        groups["age"] = ([f"{index + 1}" for index in range(int(age.max()) + 1)], age)
    return groups


def _add_groups(
    result: dict[str, float],
    kind: str,
    names: list[str],
    group: np.ndarray,
    weights: np.ndarray,
    metrics: dict[str, np.ndarray],
) -> None:
    counts = np.bincount(group, weights, minlength=len(names))
    present = np.bincount(group, minlength=len(names)) > 0
    for metric, each in metrics.items():
        sums = np.bincount(group, weights * each, minlength=len(names))
        for index in np.flatnonzero(present).tolist():
            name = f"{kind}/{names[index]}"
            result[f"{name}/rows"] = float(counts[index])
            result[f"{name}/{metric}"] = float(sums[index] / counts[index]) if counts[index] > 0 else np.nan


def _novelty(table: pa.Table, best: np.ndarray, counts: np.ndarray) -> np.ndarray:
    header = header_of(table)
    share = (counts + 1) / (header.events + header.items)
    return _row_mean(-np.log2(share), best)


def _row_mean(values: np.ndarray, valid: np.ndarray) -> np.ndarray:
    return np.where(valid, values, 0).sum(1) / np.maximum(valid.sum(1), 1)


def _mean_within(total: np.ndarray, above: np.ndarray, tied: np.ndarray, k: int) -> np.ndarray:
    """total [k + 1]: what the first n places are worth together. The expected worth of a place in above + 1 … above +
    tied."""
    worth = total[np.minimum(above + tied, k)] - total[np.minimum(above, k)]
    return np.divide(worth, tied, out=np.zeros(len(above)), where=tied > 0)


def _discounts(k: int) -> np.ndarray:
    return np.append(0.0, np.cumsum(1 / np.log2(1 + np.arange(1.0, k + 1))))


def _first_group(ranks: Ranks) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each row the targets that score highest: above, tied, and how many they are; tied 0 where there are none."""
    order = np.lexsort((ranks.above, ranks.tied == 0, ranks.row))
    row, above, tied = ranks.row[order], ranks.above[order], ranks.tied[order]
    first = np.searchsorted(row, np.arange(ranks.rows))
    same = (above == above[first][row]) & (tied > 0)
    return above[first], tied[first], np.maximum(np.bincount(row, same, ranks.rows).astype(np.int64), 1)


def _targets_of(ranks: Ranks) -> np.ndarray:
    return np.bincount(ranks.row, minlength=ranks.rows)


def _sum(ranks: Ranks, values: np.ndarray) -> np.ndarray:
    return np.bincount(ranks.row, values, minlength=ranks.rows)


def _harmonic(count: np.ndarray) -> np.ndarray:
    return digamma(count + 1.0)


def _log_choose(n: np.ndarray, k: np.ndarray) -> np.ndarray:
    return gammaln(n + 1.0) - gammaln(k + 1.0) - gammaln(n - k + 1.0)
