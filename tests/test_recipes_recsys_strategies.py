"""Recommendation trains alike under every strategy, the tied item table too, and goes on under another one."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.ranks import run_ranks
from tests.recipe_steps import take_steps
from tests.sessions import SETTINGS, write_log

pytestmark = pytest.mark.ranks

RECIPE = "recsys"
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp")
KINDS = {"transformer": [], "gru": ["model.kind=gru"], "id": ["model.items=id"]}
OFTEN = {("transformer", "zero3"), ("transformer", "fsdp"), ("gru", "zero2"), ("id", "ddp")}
CASES = [
    pytest.param(kind, strategy, marks=() if (kind, strategy) in OFTEN else pytest.mark.matrix)
    for kind in KINDS
    for strategy in STRATEGIES
]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    folder = tmp_path_factory.mktemp("log")
    # The item table must be large enough for zero3 to shard it: 10,000 elements.
    write_log(folder, users=150, items=500)
    placed = [word.replace("=events", f"={folder}/events").replace("=items", f"={folder}/items") for word in SETTINGS]
    placed = [word.replace("=prepared", f"={folder}/prepared") for word in placed]
    return (*placed, "model.width=32", "train.epochs=null", "train.steps=8", "optim.lr=1e-3")


@pytest.mark.parametrize(("kind", "strategy"), CASES)
def test_the_losses_are_those_of_one_process(words: tuple[str, ...], kind: str, strategy: str) -> None:
    asked = (*words, *KINDS[kind])
    expected, _ = _alone(asked)
    losses, _ = run_ranks(2, take_steps, RECIPE, asked, strategy, 2)[0]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


@functools.cache
def _alone(words: tuple[str, ...]) -> tuple[list[float], dict[str, torch.Tensor]]:
    return run_ranks(1, take_steps, RECIPE, words, "single", 1)[0]


def test_a_training_goes_on_under_another_strategy_on_other_ranks(words: tuple[str, ...], tmp_path: Path) -> None:
    expected, _ = _alone(words)
    run_ranks(2, take_steps, RECIPE, (*words, "train.stop_after_steps=4"), "zero3", 2, str(tmp_path))
    losses, _ = run_ranks(1, take_steps, RECIPE, words, "fsdp", 1, str(tmp_path))[0]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
