"""A strategy is a deployment choice: all of them train the same curve."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_train.errors import ConfigError
from dist_train.loop import train
from dist_train.parity import Recorder, find_obstacles
from tests.fakes import TinyTask, curve, make_training, train_tiny
from tests.ranks import SHARDED, run_ranks, some

pytestmark = pytest.mark.ranks


def _curve_cases() -> list[Any]:
    """All of them; `make test` takes those that differ most."""
    often = {("transformer", strategy, 2) for strategy in SHARDED} | {("cnn", "zero3", 4)}
    models = ("transformer", "lstm", "cnn", "tied transformer")
    every = [(model, strategy, size) for model in models for strategy in SHARDED for size in (2, 4)]
    return [pytest.param(*case, marks=() if case in often else pytest.mark.matrix) for case in every]


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


@pytest.mark.parametrize("strategy", some(SHARDED, "zero3"))
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


@pytest.mark.parametrize("strategy", some(["ddp", "zero1", "zero2", "fsdp"], "fsdp"))
def test_compiled_blocks_change_nothing(strategy: str) -> None:
    sections: dict[str, dict[str, object]] = {"train": {"compile": True}}
    seen = run_ranks(2, _curves, 2, "transformer", strategy, sections, timeout_s=300.0)
    assert_same_curves(seen[0], _alone("transformer"))


@pytest.mark.parametrize("key", ["activation_checkpointing", "compile"])
def test_what_needs_blocks_is_refused_for_a_model_without(tmp_path: Path, key: str) -> None:
    with pytest.raises(ConfigError, match=f"train.{key} is true, but this model has no repeated blocks"):
        make_training(tmp_path, 1, TinyTask(model="lstm"), train={key: True})


@pytest.mark.parametrize("strategy", some(SHARDED, "zero3"))
def test_every_strategy_trains_on_one_rank_too(strategy: str) -> None:
    assert_same_curves(run_ranks(1, _curves, 1, "transformer", strategy, {})[0], _alone("transformer"))


def assert_same_curves(seen: dict[str, Any], expected: dict[str, Any]) -> None:
    assert len(seen["losses"]) == 20
    np.testing.assert_allclose(seen["losses"], expected["losses"], rtol=1e-5)
    np.testing.assert_allclose(seen["gradient_norms"], expected["gradient_norms"], rtol=1e-5)
    for step, (mine, theirs) in enumerate(zip(seen["gradients"], expected["gradients"], strict=True), start=1):
        assert np.linalg.norm(mine - theirs) <= 1e-5 * np.linalg.norm(theirs), f"gradient of step {step}"


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


@pytest.mark.parametrize("strategy", some(SHARDED, "fsdp"))
def test_gradients_that_travel_in_bf16_change_little_and_not_nothing(tmp_path: Path, strategy: str) -> None:
    for communication in ("fp32", "bf16"):
        run_ranks(2, _train_communicating, tmp_path / communication, strategy, communication)
    exact, rounded = np.array(curve(tmp_path / "fp32")), np.array(curve(tmp_path / "bf16"))
    assert np.max(np.abs(rounded / exact - 1)) < 0.02
    assert np.max(np.abs(rounded / exact - 1)) > 1e-6


def _train_communicating(path: Path, strategy: str, communication: str) -> None:
    parallel = {"strategy": strategy, "communication": communication}
    train_tiny(path, 2, TinyTask(model="transformer"), parallel=parallel, optim={"lr": 1e-3}, train={"steps": 10})


@functools.cache
def _alone(model: str) -> dict[str, Any]:
    return run_ranks(1, _curves, 1, model, "single", {})[0]


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


@pytest.mark.parametrize("strategy", some(["single", "zero1", "zero2", "zero3", "fsdp"], "single", "zero2"))
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
