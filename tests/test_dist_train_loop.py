"""The result does not depend on the hardware, and a stopped run goes on as if nothing had happened."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.fakes import TinyTask, curve, train_tiny
from tests.ranks import run_ranks

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 steps on one rank, one micro-batch a step."""
    path = tmp_path_factory.mktemp("alone")
    run_ranks(1, train_tiny, path, 1, TinyTask(), 1)
    return path


@pytest.mark.parametrize(
    ("world_size", "micro_batch_size"), [(1, 8), (1, 5), (2, 8), (2, 3), (4, 4), (4, 1)], ids=lambda value: str(value)
)
def test_every_split_of_the_batch_gives_the_same_losses(
    alone: Path, tmp_path: Path, world_size: int, micro_batch_size: int
) -> None:
    run_ranks(world_size, _train, tmp_path, world_size, {"train": {"micro_batch_size": micro_batch_size}})
    assert len(curve(tmp_path)) == 20
    np.testing.assert_allclose(curve(tmp_path), curve(alone), rtol=1e-5)
    np.testing.assert_allclose(curve(tmp_path, "grad_norm"), curve(alone, "grad_norm"), rtol=1e-4)


def test_a_global_batch_that_does_not_divide_gives_the_same_losses(tmp_path: Path) -> None:
    for world_size in (1, 2, 4):
        run_ranks(world_size, _train, tmp_path / str(world_size), world_size, {"train": {"global_batch_size": 13}})
    for world_size in (2, 4):
        np.testing.assert_allclose(curve(tmp_path / str(world_size)), curve(tmp_path / "1"), rtol=1e-5)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(tmp_path: Path, world_size: int) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings = {"train": {"ema_decay": 0.9}}
    expected = run_ranks(world_size, _train, whole, world_size, settings, 0.3)[0]
    for attempt, stop in ((1, 7), (2, 12), (3, None)):
        staged = {"train": {"ema_decay": 0.9, "stop_after_steps": stop}}
        weights = run_ranks(world_size, _train, parts, world_size, staged, 0.3, attempt)[0]
    assert curve(parts) == curve(whole)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.parametrize("world_size", [1, 4])
def test_a_run_goes_on_with_another_number_of_ranks(alone: Path, tmp_path: Path, world_size: int) -> None:
    run_ranks(2, _train, tmp_path, 2, {"train": {"stop_after_steps": 9}})
    run_ranks(world_size, _train, tmp_path, world_size, {}, 0.0, 2)
    np.testing.assert_allclose(curve(tmp_path), curve(alone), rtol=1e-5)
    assert curve(tmp_path, "samples") == curve(alone, "samples")


def _train(
    path: Path, world_size: int, settings: dict[str, dict[str, object]], dropout: float = 0.0, attempt: int = 1
) -> dict[str, torch.Tensor]:
    return train_tiny(path, world_size, TinyTask(dropout=dropout), attempt, **settings)
