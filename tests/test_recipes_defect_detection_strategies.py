"""Defect detection trains alike under every strategy, augmentation and all, and goes on under another one."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.parts import SETTINGS, write_parts
from tests.ranks import run_ranks
from tests.recipe_steps import take_steps

pytestmark = pytest.mark.ranks

RECIPE = "defect_detection"
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp")
KINDS = {"resnet": [], "convnext": ["model.kind=convnext", "model.stem_stride=4"]}
OFTEN = {("resnet", "zero3"), ("resnet", "fsdp"), ("convnext", "zero2")}
CASES = [
    pytest.param(kind, strategy, marks=() if (kind, strategy) in OFTEN else pytest.mark.matrix)
    for kind in KINDS
    for strategy in STRATEGIES
]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    folder = tmp_path_factory.mktemp("parts")
    write_parts(folder / "parts", 120)
    placed = [
        word.replace("=parts/", f"={folder}/parts/").replace("=prepared", f"={folder}/prepared") for word in SETTINGS
    ]
    switches = ["augment.scratches=0.2", "augment.paste=0.2", "augment.noise=0.02", "augment.blur_px=0.5"]
    losses = ["task.loss=focal", "task.balanced_share=0.5", "model.drop_path=0", "model.dropout=0"]
    lengths = ["train.epochs=null", "train.steps=8", "track.wandb=disabled", "optim.lr=1e-3"]
    return (*placed, *switches, *losses, *lengths)


@pytest.mark.parametrize(("kind", "strategy"), CASES)
def test_a_network_trains_alike_under_every_strategy(words: tuple[str, ...], kind: str, strategy: str) -> None:
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
