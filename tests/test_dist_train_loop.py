"""The result does not depend on the hardware, and a stopped run goes on as if nothing had happened."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from dist_train.checkpoint_files import newest_valid
from dist_train.data import Schedule, row_seeds
from dist_train.errors import ConfigError
from dist_train.evaluate import evaluate
from dist_train.events import read_lines
from dist_train.hardware import Gpu, Hardware
from dist_train.loop import train
from dist_train.rundir import RunDir
from dist_train.score import Score, Values
from tests.fakes import TinyRows, TinyTask, curve, events, make_training, train_tiny
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


@pytest.mark.parametrize(("num_rows", "batch"), [(203, 13), (193, 16)], ids=["uneven shares", "last batch of one row"])
def test_a_batch_that_does_not_divide_gives_the_same_losses(tmp_path: Path, num_rows: int, batch: int) -> None:
    settings = {"train": {"global_batch_size": batch}}
    for world_size in (1, 2, 4):
        task = TinyTask(num_rows)
        run_ranks(world_size, _train, tmp_path / str(world_size), world_size, settings, 1, task)
    for world_size in (2, 4):
        np.testing.assert_allclose(curve(tmp_path / str(world_size)), curve(tmp_path / "1"), rtol=1e-5)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(tmp_path: Path, world_size: int) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings = {"train": {"ema_decay": 0.9}}
    task = TinyTask(dropout=0.3)
    expected = run_ranks(world_size, _train, whole, world_size, settings, 1, task)[0]
    for attempt, stop in ((1, 7), (2, 12), (3, None)):
        staged = {"train": {"ema_decay": 0.9, "stop_after_steps": stop}}
        weights = run_ranks(world_size, _train, parts, world_size, staged, attempt, task)[0]
    assert curve(parts) == curve(whole)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.parametrize("world_size", [1, 4])
def test_a_run_goes_on_with_another_number_of_ranks(alone: Path, tmp_path: Path, world_size: int) -> None:
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    run_ranks(2, _train, tmp_path, 2, {"train": {"stop_after_steps": 9}}, 1, TinyTask(record=first))
    run_ranks(world_size, _train, tmp_path, world_size, {}, 2, TinyTask(record=second))
    np.testing.assert_allclose(curve(tmp_path), curve(alone), rtol=1e-5)
    assert curve(tmp_path, "samples") == curve(alone, "samples")
    # The rows that were trained, before and after: none lost, none twice, in the order of the schedule.
    schedule = Schedule(203, 16, 0)
    for record, steps in ((first, range(9)), (second, range(9, 20))):
        taken = [index for line in read_lines(record) for index in line["indices"]]
        assert sorted(taken) == sorted(int(row) for step in steps for row in schedule.rows_of(step))


def test_a_checkpoint_of_format_1_that_two_ranks_wrote_is_resumed(tmp_path: Path) -> None:
    settings = {"train": {"ema_decay": 0.9}}
    run_ranks(1, _train, tmp_path / "whole", 1, settings)
    shutil.copytree(Path(__file__).parent / "data" / "checkpoint-format-1", tmp_path / "old" / "checkpoints")
    run_ranks(1, _train, tmp_path / "old", 1, settings, 2)
    assert len(curve(tmp_path / "old")) == 11
    np.testing.assert_allclose(curve(tmp_path / "old"), curve(tmp_path / "whole")[9:], rtol=1e-5)


def test_a_gradient_that_is_not_finite_is_skipped_alike_on_all_ranks(tmp_path: Path) -> None:
    poisoned = int(Schedule(203, 16, 0).rows_of(6)[3])
    task = TinyTask(poisoned=(poisoned,))
    first, second = run_ranks(2, _train, tmp_path, 2, {}, 1, task)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in first.values())
    bad_steps = [step + 1 for step in range(20) if poisoned in Schedule(203, 16, 0).rows_of(step)]
    assert len(bad_steps) == 2, "once in each epoch"
    assert [step for step, loss in enumerate(curve(tmp_path), start=1) if loss is None] == bad_steps
    skipped = events(tmp_path, "nonfinite_step")
    assert [event["step"] for event in skipped] == bad_steps
    assert all(poisoned in event["rows"] for event in skipped)
    line = next(line for line in read_lines(RunDir(tmp_path).metrics) if line["step"] == 7)
    assert {"loss", "grad_norm"} <= set(line["nonfinite"])


def test_three_steps_in_a_row_that_are_not_finite_stop_the_run_before_a_checkpoint_holds_them(tmp_path: Path) -> None:
    poisoned = tuple(int(Schedule(203, 16, 0).rows_of(step)[0]) for step in (6, 7, 8))
    task = TinyTask(poisoned=poisoned)
    with pytest.raises(AssertionError, match="NumericError: the gradient was not finite in 3 steps in a row"):
        run_ranks(2, _train, tmp_path, 2, {"checkpoint": {"every_steps": 5}}, 1, task)
    manifest, damages = newest_valid(RunDir(tmp_path).checkpoints)
    assert manifest is not None
    assert (manifest["step"], damages) == (5, [])


def test_early_stopping_counts_on_over_a_resume(tmp_path: Path) -> None:
    settings = {"eval": {"every_steps": 2, "patience": 3}, "optim": {"lr": 1e-12}}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_ranks(1, _train, whole, 1, settings)
    # Nothing is learnt at this rate, so three evaluations after the first one the run ends.
    assert len(curve(whole)) == 8
    run_ranks(1, _train, parts, 1, {**settings, "train": {"stop_after_steps": 5}})
    run_ranks(1, _train, parts, 1, settings, 2)
    assert curve(parts) == curve(whole)


def test_a_metric_that_the_split_cannot_tell_leaves_the_choice_to_the_loss_and_stops_nothing(tmp_path: Path) -> None:
    settings = {"eval": {"every_steps": 2, "patience": 3}}
    states = run_ranks(1, _train_undefined, tmp_path / "loss", "log_loss", settings)
    assert states[0]["best_metric"] == "log_loss"
    assert states[0]["best_step"] == 4, "the loss rises after step 4"
    assert states[0]["stopped_early"]
    told = [event["message"] for event in events(tmp_path / "loss", "progress")]
    assert told[-2] == "pr_auc is not defined on the validation split: log_loss picks the best step instead"
    assert told[-1] == "stopping early: 3 evaluations without a better log_loss (eval.patience)"
    state = run_ranks(1, _train_undefined, tmp_path / "none", None, settings)[0]
    assert (state["best_step"], state["stopped_early"], state["step"]) == (None, False, 20)


def _train_undefined(path: Path, loss: str | None, settings: dict[str, dict[str, object]]) -> dict[str, object]:
    """The counters after a training whose metric is not a number, and whose loss falls for two evaluations."""
    losses = iter([3.0, 1.0, 2.0, 4.0, 5.0, *[0.5] * 20])

    def measure(table: pa.Table) -> Values:
        value = next(losses)
        return lambda weights: {"pr_auc": float("nan"), "log_loss": value}

    training = make_training(path, 1, TinyTask(), score=Score("pr_auc", measure, ("pr_auc",), loss=loss), **settings)
    train(training)
    return asdict(training.state)


def test_a_world_that_is_not_the_planned_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="ConfigError: 1 ranks were started, but the plan has 2"):
        run_ranks(1, _train, tmp_path, 2, {})


def test_a_device_that_torch_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the plan is for cuda, but torch offers cpu here"):
        make_training(
            tmp_path, 1, TinyTask(), hardware=Hardware("host", "cpu", 2, 8.0, (Gpu(0, "GPU-a", "a GPU", 80.0),))
        )


def test_sgd_keeps_its_momentum_over_a_resume(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings = {"optim": {"name": "sgd", "lr": 0.05}}
    run_ranks(2, _train, whole, 2, settings)
    run_ranks(2, _train, parts, 2, {**settings, "train": {"stop_after_steps": 9}})
    run_ranks(2, _train, parts, 2, settings, 2)
    assert curve(parts) == curve(whole)


def test_bf16_computes_over_fp32_weights_and_learns(alone: Path, tmp_path: Path) -> None:
    weights = run_ranks(2, _train, tmp_path, 2, {"train": {"precision": "bf16", "steps": 60}})[0]
    assert all(tensor.dtype == torch.float32 for tensor in weights.values() if tensor.is_floating_point())
    np.testing.assert_allclose(curve(tmp_path)[0], curve(alone)[0], rtol=1e-2)
    assert np.mean(curve(tmp_path)[-10:]) < 0.95 * np.mean(curve(tmp_path)[:10])


@pytest.mark.parametrize("rows", [1, 2, 31])
def test_evaluation_sees_every_row_once_on_any_number_of_ranks(tmp_path: Path, rows: int) -> None:
    for world_size in (1, 3):
        for probability, one_by_one in run_ranks(world_size, _evaluate, tmp_path / str(world_size), world_size, rows):
            np.testing.assert_allclose(probability, one_by_one, rtol=1e-5)


def _train(
    path: Path, world_size: int, settings: dict[str, dict[str, object]], attempt: int = 1, task: TinyTask | None = None
) -> dict[str, torch.Tensor]:
    return train_tiny(path, world_size, task or TinyTask(), attempt, **settings)


def _evaluate(path: Path, world_size: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The probabilities of all rows, by all ranks together and by this one alone, a row at a time."""
    training = make_training(path, world_size, TinyTask())
    rows = TinyRows("validation", count)
    together = evaluate(training.engine, training.task, rows, 4)["probability"]
    module = training.engine.module.eval()
    with torch.no_grad():
        alone = [module(training.task.collate([row], row_seeds(0, 0, rows.ids))) for row in rows.take(np.arange(count))]
    return together, np.concatenate([outputs["probability"].numpy() for outputs in alone])


def test_the_time_that_a_step_waits_for_its_batch_is_told(alone: Path, tmp_path: Path) -> None:
    run_ranks(1, train_tiny, tmp_path, 1, TinyTask(collate_s=0.05), 1)
    fast, slow = (curve(path, "input_wait_share") for path in (alone, tmp_path))
    assert np.median(slow[1:]) > 0.6
    assert 0 <= np.median(fast[1:]) < 0.4
