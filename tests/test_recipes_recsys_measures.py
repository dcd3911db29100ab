"""Ranking metrics are the expected ones over every order of items that score the same."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from recipes.recsys.measures import Ranks, average_precision, hit_rate, mrr, ndcg, target_gain, target_hit
from recipes.recsys.ranking import Ranked, can_be_listed, rank


def ranked_of(
    scores: torch.Tensor,
    targets: list[list[int]],
    excluded: list[list[int]],
    k: int,
    candidates: torch.Tensor | None = None,
) -> Ranked:
    asked = torch.tensor(targets)
    listed = can_be_listed(scores.shape[1], asked, torch.tensor(excluded, dtype=torch.long), candidates)
    return rank(scores, asked, listed, k)


def test_a_constant_scorer_over_a_thousand_items_gets_the_expected_ndcg() -> None:
    ranked = ranked_of(torch.zeros(3, 1000), [[1], [500], [1000]], [[0], [0], [0]], 10)
    ranks = Ranks(ranked.above[:, 0].numpy(), ranked.tied[:, 0].numpy(), np.arange(3), 3)
    expected = np.mean(1 / np.log2(1 + np.arange(1.0, 11))) * 10 / 1000
    np.testing.assert_allclose(ndcg(ranks, 10), expected)
    assert round(expected, 5) == 0.00454


@pytest.mark.parametrize("seed", range(30))
def test_every_metric_is_its_mean_over_all_orders_of_tied_items(seed: int) -> None:
    generator = np.random.default_rng(seed)
    scores = generator.integers(0, 3, 6)
    targets = generator.choice(6, int(generator.integers(1, 4)), replace=False)
    k = int(generator.integers(1, 7))
    above = np.array([(scores > scores[target]).sum() for target in targets])
    tied = np.array([(scores == scores[target]).sum() for target in targets])
    ranks = Ranks(above, tied, np.zeros(len(targets), dtype=np.int64), 1)
    every = [
        _plain(np.array(order), targets, k)
        for order in itertools.permutations(range(6))
        if all(scores[a] >= scores[b] for a, b in itertools.pairwise(order))
    ]
    measured = [ndcg(ranks, k)[0], hit_rate(ranks, k)[0], mrr(ranks)[0], average_precision(ranks, k)[0]]
    np.testing.assert_allclose(measured, np.mean(every, axis=0), atol=1e-12)


def _plain(order: np.ndarray, targets: np.ndarray, k: int) -> list[float]:
    """NDCG, hit, 1 / rank and average precision of one order."""
    places = np.sort([int(np.flatnonzero(order == target)[0]) + 1 for target in targets])
    inside = places[places <= k]
    ideal = (1 / np.log2(1 + np.arange(1, min(len(targets), k) + 1))).sum()
    precision = [(index + 1) / place for index, place in enumerate(inside)]
    return [
        (1 / np.log2(1 + inside)).sum() / ideal,
        float(len(inside) > 0),
        1 / places[0],
        sum(precision) / min(len(targets), k),
    ]


def test_a_target_that_cannot_be_recommended_is_a_miss() -> None:
    ranks = Ranks(np.array([0]), np.array([0]), np.array([0]), 1)
    assert [metric[0] for metric in (ndcg(ranks, 5), hit_rate(ranks, 5), mrr(ranks), average_precision(ranks, 5))] == [
        0,
        0,
        0,
        0,
    ]
    assert target_gain(ranks.above, ranks.tied, 5)[0] == target_hit(ranks.above, ranks.tied, 5)[0] == 0


def test_seen_items_are_passed_over_but_not_the_target() -> None:
    scores = torch.tensor([[5.0, 4.0, 3.0, 2.0]])
    ranked = ranked_of(scores.clone(), [[2, 4]], [[1, 2, 0]], 3)
    assert ranked.above.tolist() == [[0, 2]]
    assert ranked.best.tolist() == [[2, 3, 4]]


def test_an_item_that_is_not_available_is_neither_listed_nor_found() -> None:
    candidates = torch.tensor([[False, True, True]])
    ranked = ranked_of(torch.tensor([[5.0, 4.0, 3.0]]), [[1, 3]], [[]], 5, candidates)
    assert ranked.tied.tolist() == [[0, 1]]
    assert ranked.best.tolist() == [[2, 3, 0, 0, 0]]
