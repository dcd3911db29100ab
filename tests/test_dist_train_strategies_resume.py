"""Every strategy goes on from the checkpoint of every other, on any number of ranks."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist_train.checkpoint import Reader
from dist_train.checkpoint_files import newest_valid, step_folder
from dist_train.rundir import RunDir
from tests.fakes import TinyTask, curve, train_tiny
from tests.ranks import SHARDED, run_ranks, some

pytestmark = pytest.mark.ranks

# What a resume must bring back beside the weights: moving average, buffers, optimizer state.
RESUMED = {
    "train": {"ema_decay": 0.9, "steps": 12, "micro_batch_size": 16},
    "optim": {"lr": 1e-3},
    "eval": {"every_steps": 6},
}
SAVED_AT, LAST = 7, 12


def _resume_cases() -> list[Any]:
    """Each strategy from each; `make test` goes once around."""
    every = ["single", *SHARDED]
    often = set(zip(every, [*every[1:], every[0]], strict=True))
    pairs = [(before, after) for before in every for after in every]
    return [pytest.param(*pair, marks=() if pair in often else pytest.mark.matrix) for pair in pairs]


@pytest.mark.parametrize("strategy", some(["single", "zero2", "zero3"], "zero3"))
def test_a_parameter_without_a_gradient_survives_a_resume(tmp_path: Path, strategy: str) -> None:
    for attempt, stop in ((1, 7), (2, None)):
        run_ranks(1, _train_unused, tmp_path / "parts", strategy, stop, attempt)
    run_ranks(1, _train_unused, tmp_path / "whole", strategy, None, 1)
    np.testing.assert_allclose(curve(tmp_path / "parts"), curve(tmp_path / "whole"), rtol=1e-5)


def _train_unused(path: Path, strategy: str, stop: int | None, attempt: int) -> None:
    sections = {"parallel": {"strategy": strategy}, "train": {"stop_after_steps": stop}}
    train_tiny(path, 1, TinyTask(model="unused layer"), attempt, **sections)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each strategy stopped at step 7, and one that ran through."""
    root = tmp_path_factory.mktemp("saved")
    paths = {}
    for strategy in ("single", *SHARDED):
        world_size = 1 if strategy == "single" else 2
        paths[strategy] = root / strategy
        run_ranks(world_size, _train_to, paths[strategy], world_size, strategy, SAVED_AT)
    paths["whole"] = root / "whole"
    run_ranks(1, _train_to, paths["whole"], 1, "single", None)
    return paths


@pytest.mark.parametrize(("before", "after"), _resume_cases())
def test_every_strategy_goes_on_from_the_checkpoint_of_every_other(
    saved: dict[str, Path], tmp_path: Path, before: str, after: str
) -> None:
    _go_on(saved[before], tmp_path / "run", [(after, 1 if after == "single" else 2, None)])
    _assert_same_end(tmp_path / "run", saved["whole"])


@pytest.mark.parametrize("strategy", some(SHARDED, "zero3"))
def test_two_ranks_then_one_then_four_go_on_alike(saved: dict[str, Path], tmp_path: Path, strategy: str) -> None:
    _go_on(saved[strategy], tmp_path / "run", [(strategy, 1, 9), (strategy, 4, None)])
    _assert_same_end(tmp_path / "run", saved["whole"])


def _go_on(before: Path, path: Path, stages: list[tuple[str, int, int | None]]) -> None:
    shutil.copytree(before, path)
    for attempt, (strategy, world_size, stop) in enumerate(stages, start=2):
        run_ranks(world_size, _train_to, path, world_size, strategy, stop, attempt)


def _assert_same_end(path: Path, whole: Path) -> None:
    assert len(curve(path)) == LAST
    np.testing.assert_allclose(curve(path)[SAVED_AT:], curve(whole)[SAVED_AT:], rtol=1e-5)
    mine, theirs = _end_state(path), _end_state(whole)
    assert mine.keys() == theirs.keys()
    assert "buffer/data" not in mine, "a buffer that is not persistent is no state"
    for kind in ("optim/exp_avg/", "optim/exp_avg_sq/", "ema/", "buffer/", "optim/step/"):
        names = [name for name in theirs if name.startswith(kind)]
        assert names
        a, b = (torch.cat([state[name].reshape(-1).double() for name in names]) for state in (mine, theirs))
        assert float((a - b).norm() / b.norm()) < 1e-4, kind


def _end_state(path: Path) -> dict[str, torch.Tensor]:
    manifest, _ = newest_valid(RunDir(path).checkpoints)
    assert manifest is not None
    assert manifest["step"] == LAST
    return Reader(step_folder(RunDir(path).checkpoints, LAST), manifest).whole("")


def _train_to(path: Path, world_size: int, strategy: str, stop: int | None, attempt: int = 1) -> None:
    settings = {**RESUMED, "parallel": {"strategy": strategy}}
    settings["train"] = {**RESUMED["train"], "stop_after_steps": stop}
    train_tiny(path, world_size, TinyTask(model="transformer"), attempt, **settings)
