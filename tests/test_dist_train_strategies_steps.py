"""What a step does under every strategy where something is unusual: gradients that are not finite, probes, fp16."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dist_train.data import Schedule
from dist_train.loop import probe_largest, train
from tests.fakes import TinyTask, curve, events, make_training, train_tiny
from tests.ranks import SHARDED, run_ranks, some

pytestmark = pytest.mark.ranks


@pytest.mark.parametrize("strategy", some(SHARDED, "ddp", "zero2"))
def test_a_gradient_that_is_not_finite_reaches_no_weight_under_any_strategy(tmp_path: Path, strategy: str) -> None:
    poisoned = int(Schedule(203, 16, 0).rows_of(6)[3])
    weights = run_ranks(2, _train_poisoned, tmp_path, strategy, poisoned)[0]
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights.values())
    assert next(event["step"] for event in events(tmp_path, "nonfinite_step")) == 7
    assert all(poisoned in event["rows"] for event in events(tmp_path, "nonfinite_step"))
    with_none = [step for step, loss in enumerate(curve(tmp_path), start=1) if loss is None]
    assert with_none[0] == 7
    assert curve(tmp_path)[7] is not None


@pytest.mark.parametrize("optimizer", some(["adamw", "sgd"], "adamw"))
@pytest.mark.parametrize("strategy", some(["single", *SHARDED], "zero3"))
def test_the_probe_of_the_largest_micro_batch_changes_nothing(tmp_path: Path, strategy: str, optimizer: str) -> None:
    world_size = 1 if strategy == "single" else 2
    run_ranks(world_size, _train_probed, tmp_path / "probed", world_size, strategy, optimizer, True)
    run_ranks(world_size, _train_probed, tmp_path / "plain", world_size, strategy, optimizer, False)
    assert curve(tmp_path / "probed") == curve(tmp_path / "plain")


def _train_probed(path: Path, world_size: int, strategy: str, optimizer: str, probes: bool) -> None:
    sections = {"parallel": {"strategy": strategy}, "train": {"steps": 6, "micro_batch_size": 4}}
    training = make_training(path, world_size, TinyTask(), optim={"name": optimizer}, **sections)
    if probes:
        probe_largest(training, training.task.rows("train"))
    train(training)


def test_statistics_of_a_batch_norm_do_not_keep_what_is_not_finite(tmp_path: Path) -> None:
    poisoned = int(Schedule(203, 16, 0).rows_of(6)[3])
    weights = run_ranks(1, _train_poisoned_norm, tmp_path, poisoned)[0]
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights.values())


def _train_poisoned_norm(path: Path, poisoned: int) -> dict[str, torch.Tensor]:
    return train_tiny(path, 1, TinyTask(model="cnn with BatchNorm", poisoned=(poisoned,)))


def _train_poisoned(path: Path, strategy: str, poisoned: int) -> dict[str, torch.Tensor]:
    return train_tiny(path, 2, TinyTask(poisoned=(poisoned,)), parallel={"strategy": strategy})
