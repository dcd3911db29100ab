"""Layer rates, freezing and gradual unfreezing give one result under every strategy, and over a resume."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist_train.checkpoint import Reader
from dist_train.checkpoint_files import newest_valid, step_folder
from dist_train.rundir import RunDir
from tests.fakes import TinyTask, curve, events, make_training, train_tiny
from tests.ranks import run_ranks

pytestmark = pytest.mark.ranks

# `make test` takes those that differ most.
_DDP, _ZERO1, _ZERO2, _FSDP = (
    pytest.param(name, marks=pytest.mark.matrix) for name in ("ddp", "zero1", "zero2", "fsdp")
)
STRATEGIES = pytest.mark.parametrize("strategy", [_DDP, _ZERO1, _ZERO2, "zero3", "fsdp"])
ONE_IS_ENOUGH = pytest.mark.parametrize("strategy", ["zero3", _DDP, _ZERO2, _FSDP])
# All keys at once: the embeddings are frozen, the head learns from step 1, the blocks from steps 5 and 9.
TUNED: dict[str, Any] = {
    "optim": {"lr": 3e-4, "head_lr": 1e-3, "layer_decay": 0.5, "freeze": 0, "unfreeze_every_steps": 4},
    "train": {"steps": 12, "ema_decay": 0.9, "micro_batch_size": 5},
    "eval": {"every_steps": 6},
}
BACKBONE: dict[str, Any] = {**TUNED, "optim": {"lr": 3e-4, "freeze": "backbone"}}


@functools.cache
def _alone(frozen_backbone: bool) -> tuple[list[float], dict[str, torch.Tensor]]:
    settings = BACKBONE if frozen_backbone else TUNED
    return run_ranks(1, _train, None, 1, "single", settings)[0]


@STRATEGIES
@pytest.mark.parametrize("frozen_backbone", [False, True], ids=["every key", "frozen backbone"])
def test_every_strategy_trains_the_same_and_leaves_what_is_frozen(
    tmp_path: Path, strategy: str, frozen_backbone: bool
) -> None:
    settings = BACKBONE if frozen_backbone else TUNED
    losses, weights = run_ranks(2, _train, tmp_path, 2, strategy, settings)[0]
    expected, its_weights = _alone(frozen_backbone)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    before = _before()
    frozen = [name for name in before if (not _is_head(name) if frozen_backbone else name == "body.token.weight")]
    assert frozen
    for name in before:
        assert torch.equal(weights[name], before[name]) == (name in frozen), name
        torch.testing.assert_close(weights[name], its_weights[name], rtol=1e-3, atol=1e-4)
    state = _end_state(tmp_path)
    # A frozen weight has no optimizer state, and its moving average is itself.
    assert {name.split("/", 2)[2] for name in state if name.startswith("optim/")} == set(before) - set(frozen)
    assert all(torch.equal(state[f"ema/{name}"], before[name]) for name in frozen)


@ONE_IS_ENOUGH
def test_what_is_not_unfrozen_yet_has_not_moved_a_bit(tmp_path: Path, strategy: str) -> None:
    settings = {**TUNED, "train": {**TUNED["train"], "stop_after_steps": 4}}
    _, weights = run_ranks(2, _train, tmp_path, 2, strategy, settings)[0]
    before = _before()
    assert {name for name in before if not torch.equal(weights[name], before[name])} == set(filter(_is_head, before))


@ONE_IS_ENOUGH
def test_a_resume_goes_on_unfreezing_where_it_was(tmp_path: Path, strategy: str) -> None:
    first = {**TUNED, "train": {**TUNED["train"], "stop_after_steps": 5}}
    run_ranks(2, _train, tmp_path / "parts", 2, strategy, first)
    losses, weights = run_ranks(2, _train, tmp_path / "parts", 2, strategy, TUNED, 2)[0]
    expected, its_weights = run_ranks(2, _train, tmp_path / "whole", 2, strategy, TUNED)[0]
    assert losses == expected
    assert all(torch.equal(weights[name], its_weights[name]) for name in its_weights)


def test_the_groups_are_said_once_at_the_start(tmp_path: Path) -> None:
    run_ranks(2, _train, tmp_path, 2, "zero2", TUNED)
    told = [event["message"] for event in events(tmp_path, "progress") if event["message"].startswith("optimizer")]
    assert len(told) == 7
    assert "head: 1 parameter of 120 elements, peak lr 0.001, weight decay 0.01, learns from step 1" in told[4]


def _train(
    path: Path | None, world_size: int, strategy: str, settings: dict[str, Any], attempt: int = 1
) -> tuple[list[float], dict[str, torch.Tensor]]:
    path = path or Path(tempfile.mkdtemp())
    task = TinyTask(model="transformer")
    weights = train_tiny(path, world_size, task, attempt, **settings, parallel={"strategy": strategy})
    return curve(path), weights


@functools.cache
def _before() -> dict[str, torch.Tensor]:
    return run_ranks(1, _weights_at_the_start)[0]


def _weights_at_the_start() -> dict[str, torch.Tensor]:
    training = make_training(Path(tempfile.mkdtemp()), 1, TinyTask(model="transformer"))
    return {name: weight.detach() for name, weight in training.engine.module.named_parameters()}


def _is_head(name: str) -> bool:
    return name.startswith("body.head.")


def _end_state(path: Path) -> dict[str, torch.Tensor]:
    manifest, _ = newest_valid(RunDir(path).checkpoints)
    assert manifest is not None
    return Reader(step_folder(RunDir(path).checkpoints, manifest["step"]), manifest).whole("")
