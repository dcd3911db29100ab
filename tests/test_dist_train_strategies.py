"""A strategy is a deployment choice: all of them train the same curve, and go on from each other's checkpoints."""

from __future__ import annotations

import functools
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist_train.checkpoint import Reader
from dist_train.checkpoint_files import newest_valid, step_folder
from dist_train.data import Schedule
from dist_train.errors import ConfigError
from dist_train.loop import probe_largest, train
from dist_train.parity import Recorder, find_obstacles
from dist_train.rundir import RunDir
from tests.fakes import TinyTask, curve, events, make_training, train_tiny
from tests.ranks import run_ranks

pytestmark = pytest.mark.ranks

SHARDED = ["ddp", "zero1", "zero2", "zero3", "fsdp"]


def _some(every: Sequence[str], *often: str) -> list[Any]:
    """All of them; `make test` takes those named."""
    return [pytest.param(name, marks=() if name in often else pytest.mark.matrix) for name in every]


def _curve_cases() -> list[Any]:
    """All of them; `make test` takes those that differ most."""
    often = {("transformer", strategy, 2) for strategy in SHARDED} | {("cnn", "zero3", 4)}
    models = ("transformer", "lstm", "cnn", "tied transformer")
    every = [(model, strategy, size) for model in models for strategy in SHARDED for size in (2, 4)]
    return [pytest.param(*case, marks=() if case in often else pytest.mark.matrix) for case in every]


def _resume_cases() -> list[Any]:
    """Each strategy from each; `make test` goes once around."""
    every = ["single", *SHARDED]
    often = set(zip(every, [*every[1:], every[0]], strict=True))
    pairs = [(before, after) for before in every for after in every]
    return [pytest.param(*pair, marks=() if pair in often else pytest.mark.matrix) for pair in pairs]


@functools.cache
def _alone(model: str) -> dict[str, Any]:
    return run_ranks(1, _curves, 1, model, "single", {})[0]


@pytest.mark.parametrize(("model", "strategy", "world_size"), _curve_cases())
def test_every_strategy_has_the_losses_norms_and_gradients_of_one_process(
    model: str, strategy: str, world_size: int
) -> None:
    expected = _alone(model)
    seen = run_ranks(world_size, _curves, world_size, model, strategy, {})
    assert_same_curves(seen[0], expected)
    whole = expected["parameter_bytes"]
    for rank in seen:
        if strategy in ("zero3", "fsdp"):
            assert rank["parameter_bytes"] < 0.9 * whole
        if strategy != "ddp":
            assert rank["optimizer_bytes"] < 0.9 * expected["optimizer_bytes"]


@pytest.mark.parametrize("strategy", _some(SHARDED, "zero3"))
@pytest.mark.parametrize(
    "sections",
    [
        {"train": {"micro_batch_size": 3}},
        {"train": {"activation_checkpointing": True}},
        {"train": {"global_batch_size": 13}},
    ],
    ids=["accumulation", "activation checkpointing", "uneven shares"],
)
def test_accumulation_checkpointing_and_uneven_shares_change_nothing(
    strategy: str, sections: dict[str, dict[str, object]]
) -> None:
    world_one = {"train": {name: value for name, value in sections["train"].items() if name == "global_batch_size"}}
    expected = run_ranks(1, _curves, 1, "transformer", "single", world_one)[0]
    assert_same_curves(run_ranks(2, _curves, 2, "transformer", strategy, sections)[0], expected)


@pytest.mark.parametrize(
    ("strategy", "offload"),
    [
        pytest.param("zero1", "optimizer", marks=pytest.mark.matrix),
        pytest.param("zero2", "optimizer", marks=pytest.mark.matrix),
        ("zero3", "parameters"),
    ],
)
def test_offload_changes_nothing(strategy: str, offload: str) -> None:
    seen = run_ranks(2, _curves, 2, "transformer", strategy, {"parallel": {"offload": offload}})
    assert_same_curves(seen[0], _alone("transformer"))


@pytest.mark.parametrize("strategy", _some(["ddp", "zero1", "zero2", "fsdp"], "fsdp"))
def test_compiled_blocks_change_nothing(strategy: str) -> None:
    sections: dict[str, dict[str, object]] = {"train": {"compile": True}}
    seen = run_ranks(2, _curves, 2, "transformer", strategy, sections, timeout_s=300.0)
    assert_same_curves(seen[0], _alone("transformer"))


@pytest.mark.parametrize("key", ["activation_checkpointing", "compile"])
def test_what_needs_blocks_is_refused_for_a_model_without(tmp_path: Path, key: str) -> None:
    with pytest.raises(ConfigError, match=f"train.{key} is true, but this model has no repeated blocks"):
        make_training(tmp_path, 1, TinyTask(model="lstm"), train={key: True})


@pytest.mark.parametrize("strategy", _some(SHARDED, "zero3"))
def test_every_strategy_trains_on_one_rank_too(strategy: str) -> None:
    assert_same_curves(run_ranks(1, _curves, 1, "transformer", strategy, {})[0], _alone("transformer"))


def assert_same_curves(seen: dict[str, Any], expected: dict[str, Any]) -> None:
    assert len(seen["losses"]) == 20
    np.testing.assert_allclose(seen["losses"], expected["losses"], rtol=1e-5)
    np.testing.assert_allclose(seen["gradient_norms"], expected["gradient_norms"], rtol=1e-5)
    for step, (mine, theirs) in enumerate(zip(seen["gradients"], expected["gradients"], strict=True), start=1):
        assert np.linalg.norm(mine - theirs) <= 1e-5 * np.linalg.norm(theirs), f"gradient of step {step}"


def _curves(world_size: int, model: str, strategy: str, sections: dict[str, dict[str, object]]) -> dict[str, Any]:
    """20 steps: every loss, norm and whole gradient, and the bytes that this rank held.

    Adam's first steps have the size of the learning rate also where a gradient is nothing but rounding: the larger the
    rate, the sooner two roundings drift apart.
    """
    path = Path(tempfile.mkdtemp())
    settings = {**sections, "parallel": {"strategy": strategy, **sections.get("parallel", {})}}
    training = make_training(path, world_size, TinyTask(model=model), optim={"lr": 3e-4}, **settings)
    recorder = Recorder(training.engine)
    train(training)
    strategy = training.engine.strategy
    return {
        **recorder.curves(),
        "gradients": recorder.gradients,
        "parameter_bytes": sum(held.flat.nbytes for held in strategy.weights()),
        "optimizer_bytes": sum(held.flat.nbytes for held in strategy.optimizer_state()),
    }


def test_a_batch_norm_is_not_equal_over_ranks_and_parity_knows_it() -> None:
    (obstacle,) = run_ranks(2, _obstacles_of, 2, "cnn with BatchNorm")[0]
    assert "BatchNorm" in obstacle
    assert run_ranks(2, _obstacles_of, 2, "cnn")[0] == []
    alone = run_ranks(1, _curves, 1, "cnn with BatchNorm", "single", {})[0]
    split = run_ranks(2, _curves, 2, "cnn with BatchNorm", "ddp", {})[0]
    assert np.max(np.abs(np.array(split["losses"]) / alone["losses"] - 1)) > 1e-4


def _obstacles_of(world_size: int, model: str) -> list[str]:
    path = Path(tempfile.mkdtemp())
    return find_obstacles(make_training(path, world_size, TinyTask(model=model), parallel={"strategy": "ddp"}))


@pytest.mark.parametrize("strategy", _some(SHARDED, "ddp", "zero2"))
def test_a_gradient_that_is_not_finite_reaches_no_weight_under_any_strategy(tmp_path: Path, strategy: str) -> None:
    poisoned = int(Schedule(203, 16, 0).rows_of(6)[3])
    weights = run_ranks(2, _train_poisoned, tmp_path, strategy, poisoned)[0]
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights.values())
    assert next(event["step"] for event in events(tmp_path, "nonfinite_step")) == 7
    assert all(poisoned in event["rows"] for event in events(tmp_path, "nonfinite_step"))
    with_none = [step for step, loss in enumerate(curve(tmp_path), start=1) if loss is None]
    assert with_none[0] == 7
    assert curve(tmp_path)[7] is not None


@pytest.mark.parametrize("optimizer", _some(["adamw", "sgd"], "adamw"))
@pytest.mark.parametrize("strategy", _some(["single", *SHARDED], "zero3"))
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


@pytest.mark.parametrize("strategy", _some(["single", "zero1", "zero2", "zero3", "fsdp"], "single", "zero2"))
def test_fp16_scales_the_loss_once_under_every_strategy(tmp_path: Path, strategy: str) -> None:
    """On a CPU the plan refuses fp16; the engine can, and so this is tested without a GPU."""
    losses, norms = run_ranks(1, _train_fp16, tmp_path, strategy)[0]
    exact = _alone("transformer")
    np.testing.assert_allclose(losses, exact["losses"][:5], rtol=2e-2)
    np.testing.assert_allclose(norms, exact["gradient_norms"][:5], rtol=5e-2)


def _train_fp16(path: Path, strategy: str) -> tuple[list[float], list[float]]:
    training = make_training(
        path, 1, TinyTask(model="transformer"), parallel={"strategy": strategy}, optim={"lr": 3e-4}, precision="fp16"
    )
    recorder = Recorder(training.engine)
    train(training)
    curves = recorder.curves()
    return curves["losses"][:5], curves["gradient_norms"][:5]


@pytest.mark.parametrize("strategy", _some(["single", "zero2", "zero3"], "zero3"))
def test_a_parameter_without_a_gradient_survives_a_resume(tmp_path: Path, strategy: str) -> None:
    for attempt, stop in ((1, 7), (2, None)):
        run_ranks(1, _train_unused, tmp_path / "parts", strategy, stop, attempt)
    run_ranks(1, _train_unused, tmp_path / "whole", strategy, None, 1)
    np.testing.assert_allclose(curve(tmp_path / "parts"), curve(tmp_path / "whole"), rtol=1e-5)


def _train_unused(path: Path, strategy: str, stop: int | None, attempt: int) -> None:
    sections = {"parallel": {"strategy": strategy}, "train": {"stop_after_steps": stop}}
    train_tiny(path, 1, TinyTask(model="unused layer"), attempt, **sections)


def test_statistics_of_a_batch_norm_do_not_keep_what_is_not_finite(tmp_path: Path) -> None:
    poisoned = int(Schedule(203, 16, 0).rows_of(6)[3])
    weights = run_ranks(1, _train_poisoned_norm, tmp_path, poisoned)[0]
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights.values())


def _train_poisoned_norm(path: Path, poisoned: int) -> dict[str, torch.Tensor]:
    return train_tiny(path, 1, TinyTask(model="cnn with BatchNorm", poisoned=(poisoned,)))


@pytest.mark.parametrize("strategy", _some(SHARDED, "fsdp"))
def test_gradients_that_travel_in_bf16_change_little_and_not_nothing(tmp_path: Path, strategy: str) -> None:
    for communication in ("fp32", "bf16"):
        run_ranks(2, _train_communicating, tmp_path / communication, strategy, communication)
    exact, rounded = np.array(curve(tmp_path / "fp32")), np.array(curve(tmp_path / "bf16"))
    assert np.max(np.abs(rounded / exact - 1)) < 0.02
    assert np.max(np.abs(rounded / exact - 1)) > 1e-6


def _train_communicating(path: Path, strategy: str, communication: str) -> None:
    parallel = {"strategy": strategy, "communication": communication}
    train_tiny(path, 2, TinyTask(model="transformer"), parallel=parallel, optim={"lr": 1e-3}, train={"steps": 10})


def _train_poisoned(path: Path, strategy: str, poisoned: int) -> dict[str, torch.Tensor]:
    return train_tiny(path, 2, TinyTask(poisoned=(poisoned,)), parallel={"strategy": strategy})


# What a resume must bring back beside the weights: moving average, buffers, optimizer state.
RESUMED = {
    "train": {"ema_decay": 0.9, "steps": 12, "micro_batch_size": 16},
    "optim": {"lr": 1e-3},
    "eval": {"every_steps": 6},
}
SAVED_AT, LAST = 7, 12


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


@pytest.mark.parametrize("strategy", _some(SHARDED, "zero3"))
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
