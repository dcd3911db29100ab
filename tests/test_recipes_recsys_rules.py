"""Sequential rules as a part of the model: their distribution and the network's, mixed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from recipes.recsys.mixture import mix, rule_scores
from recipes.recsys.rules import DECAY, count_rules, read_rules, write_rules

# Two sessions: items 1 2 3, and items 1 3.
EVENTS = np.array([1, 2, 3, 1, 3], dtype=np.int32)
ROWS = np.array([[0, 0, 3, 0], [3, 3, 5, 1]])
ITEMS = 4


def test_a_pair_counts_one_by_its_distance() -> None:
    counted = count_rules(EVENTS, ROWS, ITEMS).toarray()
    expected = np.zeros((ITEMS, ITEMS))
    expected[0, 1], expected[1, 2], expected[0, 2] = 1, 1, 1 / 2 + 1
    assert np.array_equal(counted, expected)


def test_only_targets_of_the_training_are_counted() -> None:
    """A row whose first two events are history, counted in a row before."""
    rows = np.array([[0, 2, 3, 0]])
    assert count_rules(EVENTS, rows, ITEMS).sum() == 1 + 1 / 2


def test_the_rules_of_a_session_weigh_its_last_events_most(tmp_path: Path) -> None:
    write_rules(tmp_path, EVENTS, ROWS, 3)
    after, value = (torch.from_numpy(each) for each in read_rules(tmp_path))
    scores = rule_scores(torch.tensor([[1, 2, 0], [4, 0, 0]]), torch.tensor([2, 1]), after, value, ITEMS)
    follows = count_rules(EVENTS, ROWS, ITEMS).toarray()
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
    assert mixed[1].tolist() == pytest.approx([0.75 * float(network[0]), 0.75 * float(network[1]), 0]), "no rules"
    assert mixed[2].tolist() == pytest.approx([0.25, 0, 0.75])


def test_items_that_are_next_to_impossible_keep_their_order() -> None:
    """As probabilities they would all be 0, and tie."""
    mixed = mix(torch.tensor([[900.0, 10.0, 11.0]]), torch.zeros(1, 3), 0.5, None)
    assert mixed[0, 1] < mixed[0, 2]
