"""Sequential rules as a part of the model: their distribution and the network's, mixed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import sparse

from dist_train import config_io
from recipes.recsys.config import ModelConfig
from recipes.recsys.data import describe
from recipes.recsys.mixture import mix, rule_scores
from recipes.recsys.model import Catalogue, Recommender
from recipes.recsys.rules import DECAY, HISTORY, read_rules, rule_blocks, strongest, write_rules

# Two sessions: items 1 2 3, and items 1 3.
EVENTS = np.array([1, 2, 3, 1, 3], dtype=np.int32)
ROWS = np.array([[0, 0, 3, 0], [3, 3, 5, 1]])
ITEMS = 4


def counted(events: np.ndarray, rows: np.ndarray, items: int) -> np.ndarray:
    return np.asarray(sparse.vstack([block for _, block in rule_blocks(events, rows, items, 0.0)]).toarray())


def test_a_pair_counts_one_by_its_distance() -> None:
    expected = np.zeros((ITEMS, ITEMS))
    expected[0, 1], expected[1, 2], expected[0, 2] = 1, 1, 1 / 2 + 1
    assert np.array_equal(counted(EVENTS, ROWS, ITEMS), expected)


def test_only_targets_of_the_training_are_counted() -> None:
    """A row whose first two events are history, counted in a row before."""
    rows = np.array([[0, 2, 3, 0]])
    assert counted(EVENTS, rows, ITEMS).sum() == 1 + 1 / 2


def test_blocks_of_any_size_count_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = np.random.default_rng(0)
    events = drawn.integers(1, 31, 400).astype(np.int32)
    rows = np.array([[at, at + drawn.integers(1, 5), at + drawn.integers(6, 50), 0] for at in range(0, 400, 50)])
    once = counted(events, rows, 30)
    expected = np.zeros((30, 30))
    for begin, first, stop, _ in rows:
        for target in range(first, stop):
            for before in range(max(begin, target - HISTORY), target):
                expected[events[before] - 1, events[target] - 1] += 1 / (target - before)
    np.testing.assert_allclose(once, expected, rtol=1e-5)
    monkeypatch.setattr("recipes.recsys.rules._BLOCK", 40)
    np.testing.assert_allclose(counted(events, rows, 30), expected, rtol=1e-5)


def test_the_strongest_of_each_row_are_kept() -> None:
    kept = strongest(sparse.csr_matrix([[1.0, 3.0, 2.0], [0.0, 5.0, 0.0]]), 2).toarray()
    assert kept.tolist() == [[0, 3, 2], [0, 5, 0]]


def test_events_out_of_reach_say_nothing(tmp_path: Path) -> None:
    write_rules(tmp_path, EVENTS, ROWS, 3)
    after, value = (torch.from_numpy(each) for each in read_rules(tmp_path))
    # Item 1 has rules, 4 has none.
    for size in (HISTORY, HISTORY + 1):
        events = torch.tensor([[1, *[4] * (size - 1)]])
        scores = rule_scores(events, torch.tensor([size]), after, value, ITEMS)
        assert bool(scores.any()) == (size == HISTORY)


def test_the_rules_of_a_session_weigh_its_last_events_most(tmp_path: Path) -> None:
    write_rules(tmp_path, EVENTS, ROWS, 3)
    after, value = (torch.from_numpy(each) for each in read_rules(tmp_path))
    scores = rule_scores(torch.tensor([[1, 2, 0], [4, 0, 0]]), torch.tensor([2, 1]), after, value, ITEMS)
    follows = counted(EVENTS, ROWS, ITEMS)
    both = follows + 0.5 * follows.T
    assert scores[0].numpy() == pytest.approx(DECAY * both[0] + both[1])
    assert not scores[1].any(), "an item that came after the training has no rules"


def test_a_mixture_is_a_distribution_over_what_can_be_recommended() -> None:
    scores = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [0.0, 0.0, 900.0]])
    rules = torch.tensor([[0.0, 3.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    candidates = torch.tensor([[True, True, False]] * 2 + [[True] * 3])
    mixed = mix(scores, rules, 0.25, candidates).exp()
    network = torch.tensor([1.0, 2.0]).softmax(0)
    assert mixed[0].tolist() == pytest.approx([0.75 * float(network[0]), 0.75 * float(network[1]) + 0.25, 0])
    assert mixed[1].tolist() == pytest.approx([*network.tolist(), 0]), "without rules the network's alone"
    assert mixed[2].tolist() == pytest.approx([0.25, 0, 0.75])


def test_what_cannot_be_recommended_takes_nothing_of_the_rules_share() -> None:
    """Item 2 is seen, 3 is not available: of the rules only item 4 is left, in a model whose network tells nothing."""
    config: Any = ModelConfig(width=4, heads=2, rules_share=0.25)
    known = torch.zeros(5, 2), torch.zeros(5, 1, dtype=torch.int32)
    available = torch.zeros(5, dtype=torch.int64), torch.tensor([9, 9, 9, 1, 9])
    after = torch.tensor([[0, 0, 0], [0, 0, 0], [2, 3, 4], [0, 0, 0], [0, 0, 0]], dtype=torch.int32)
    catalogue = Catalogue(4, 4, *known, [1], True, 0.0, 1.0)
    for weights in catalogue.parameters():
        torch.nn.init.zeros_(weights)
    model = Recommender(catalogue, config, 3, 4, 3, True, available=available, rules=(after, (after > 0).float()))
    batch = {
        "items": torch.tensor([[2]]),
        "gaps": torch.zeros(1, 2, dtype=torch.int64),
        "last": torch.tensor([1]),
        "asked": torch.tensor([[1]]),
        "seen": torch.tensor([[2]]),
        "moment": torch.tensor([5]),
        "most_targets": torch.zeros(1, 1),
    }
    answer = model.eval()(batch)
    assert answer["best"].tolist() == [[4, 1, 0]]
    assert answer["best_score"].exp()[0, :2].tolist() == pytest.approx([0.75 / 2 + 0.25, 0.75 / 2])
    assert (answer["above"].item(), answer["tied"].item()) == (1, 1)


def test_only_a_model_with_rules_has_them_prepared() -> None:
    described = [
        describe(config_io.load("recsys/demo", [f"model.rules_share={share}"], site=False).config)
        for share in (0, 0.2, 0.3)
    ]
    assert described[0] != described[1] == described[2]


def test_items_that_are_next_to_impossible_keep_their_order() -> None:
    """As probabilities they would all be 0, and tie."""
    mixed = mix(torch.tensor([[900.0, 10.0, 11.0]]), torch.zeros(1, 3), 0.5, torch.ones(1, 3, dtype=torch.bool))
    assert mixed[0, 1] < mixed[0, 2]
