"""Weights of an earlier run: rows go with their labels, the rest fits or is named, and the average starts from them."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dist_train.errors import ConfigError, DataError
from dist_train.init_from import Taken, describe_start, model_folder, started_from, take_weights
from dist_train.loop import train
from dist_train.parity import whole_weights
from dist_train.rundir import RunDir
from tests.fakes import TinyModel, TinyTask, events, make_training
from tests.models import CLASSES
from tests.ranks import run_ranks

BY_LABEL = ("head.weight", "head.bias")
OLD = [f"q{index}" for index in range(CLASSES)]
NEW = ["fresh", *reversed(OLD[1:])]
"""One label added, one removed, all in another order."""


def _model(labels: int, seed: int, width: int = 6) -> nn.Module:
    torch.manual_seed(seed)
    return nn.ModuleDict({"body": nn.Linear(4, width), "norm": nn.BatchNorm1d(width), "head": nn.Linear(width, labels)})


def test_rows_go_with_their_labels_and_new_labels_keep_their_fresh_rows() -> None:
    old, new, fresh = _model(3, 0), _model(4, 1), _model(4, 1)
    old["norm"].running_mean.fill_(7.0)  # type: ignore[index]
    taken = take_weights(new, old.state_dict(), ["a", "b", "c"], ["x", "c", "a", "y"], BY_LABEL, Path("best"))
    there, before, after = old.state_dict(), fresh.state_dict(), new.state_dict()
    for name in BY_LABEL:
        assert torch.equal(after[name], torch.stack([before[name][0], there[name][2], there[name][0], before[name][3]]))
    for name in after.keys() - set(BY_LABEL):
        assert torch.equal(after[name], there[name]), f"{name}: buffers are taken too"
    assert (taken.kept, taken.new, taken.removed) == (("c", "a"), ("x", "y"), ("b",))
    assert {entry.name: (entry.how, entry.rows) for entry in taken.parameters if entry.how != "whole"} == {
        "head.weight": ("rows", 2),
        "head.bias": ("rows", 2),
    }


def test_equal_labels_in_another_order_are_no_equal_head() -> None:
    old, new = _model(2, 0), _model(2, 1)
    take_weights(new, old.state_dict(), ["a", "b"], ["b", "a"], BY_LABEL, Path("best"))
    assert torch.equal(new.state_dict()["head.weight"], old.state_dict()["head.weight"].flip(0))


def test_labels_that_are_all_new_leave_the_head_as_it_is() -> None:
    old, new, fresh = _model(2, 0), _model(3, 1), _model(3, 1)
    taken = take_weights(new, old.state_dict(), ["a", "b"], ["x", "y", "z"], BY_LABEL, Path("best"))
    assert torch.equal(new.state_dict()["head.weight"], fresh.state_dict()["head.weight"])
    assert {entry.how for entry in taken.parameters if entry.name in BY_LABEL} == {"new"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda weights: weights.pop("body.bias"), ["body.bias is not in it"]),
        (lambda weights: weights.update(extra=torch.ones(1)), ["extra has no place in this model"]),
        (lambda weights: weights.update({"body.weight": torch.ones(4, 6)}), ["body.weight is (6, 4)", "(4, 6) there"]),
        (lambda weights: weights.update({"head.bias": torch.ones(9)}), ["head.bias", "one row a label (4, there 3)"]),
        (lambda weights: weights.update({"head.weight": torch.ones(3, 5)}), ["head.weight is (4, 6)", "(3, 5) there"]),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named_and_nothing_is_taken(change: object, words: list[str]) -> None:
    new, fresh = _model(4, 1), _model(4, 1)
    weights = dict(_model(3, 0).state_dict())
    change(weights)  # type: ignore[operator]
    with pytest.raises(ConfigError) as refusal:
        take_weights(new, weights, ["a", "b", "c"], ["a", "b", "c", "d"], BY_LABEL, Path("runs/old/best"))
    for word in [*words, "runs/old/best", "model.init_from"]:
        assert word in str(refusal.value)
    assert all(torch.equal(tensor, fresh.state_dict()[name]) for name, tensor in new.state_dict().items())


def test_a_run_and_its_best_folder_name_the_same_model_and_anything_else_is_refused(tmp_path: Path) -> None:
    run = _export(tmp_path / "runs" / "old")
    assert model_folder(str(run)) == model_folder(str(run / "best")) == run / "best"
    unfinished = tmp_path / "runs" / "young"
    unfinished.mkdir()
    (unfinished / "config.yaml").touch()
    with pytest.raises(DataError, match=f"no best/ yet(.|\n)*dist-train resume {unfinished}"):
        model_folder(str(unfinished))
    with pytest.raises(DataError, match="there is no such folder"):
        model_folder(str(tmp_path / "runs" / "odl"))
    with pytest.raises(DataError, match="neither a run nor its best/ folder"):
        model_folder(str(tmp_path))


@pytest.mark.ranks
@pytest.mark.parametrize("strategy", ["ddp", pytest.param("zero3", marks=pytest.mark.matrix), "fsdp"])
def test_weights_and_average_start_from_the_earlier_run_and_a_resume_does_without_it(
    tmp_path: Path, strategy: str
) -> None:
    source = _export(tmp_path / "old")
    run = tmp_path / "new"
    for weights, average in run_ranks(2, _start_and_train, run, strategy, source):
        for name, expected in _expected(source).items():
            assert torch.equal(weights[name], expected), name
            assert torch.equal(average[name], expected), f"{name}: the moving average"
    record = started_from(RunDir(run))
    assert record is not None
    assert (record["run"], record["step"], record["folder"]) == ("old", 7, str(source / "best"))
    assert record["labels"] == {"kept": NEW[1:], "new": ["fresh"], "removed": ["q0"]}
    assert len(record["sha256"]["model.safetensors"]) == 64
    assert "new: fresh; removed: q0" in describe_start(record)
    assert [event["message"] for event in events(run, "progress")] == [describe_start(record)]
    shutil.rmtree(source)
    run_ranks(2, _resume, run, strategy, source)
    assert events(run, "resumed")[-1]["step"] == 4


@dataclass
class StartingTask(TinyTask):
    source: Path = Path()
    """The earlier run."""

    def take_over(self, model: nn.Module) -> Taken | None:
        folder = model_folder(str(self.source))
        return take_weights(model, torch.load(folder / "weights.pt"), OLD, NEW, BY_LABEL, folder)


def _export(run: Path) -> Path:
    """What a finished run leaves."""
    (run / "best").mkdir(parents=True)
    (run / "config.yaml").touch()
    (run / "best" / "facts.json").write_text("{}")
    (run / "best" / "model.safetensors").write_bytes(b"any")
    (run / "best" / "dist_train.json").write_text(json.dumps({"run": run.name, "step": 7}))
    torch.manual_seed(5)
    torch.save(TinyModel(0.0).state_dict(), run / "best" / "weights.pt")
    return run


def _expected(source: Path) -> dict[str, Tensor]:
    """All but the row of the new label, which is row 0."""
    weights: dict[str, Tensor] = torch.load(source / "best" / "weights.pt")
    del weights["calls"]
    return {name: tensor for name, tensor in weights.items() if name not in BY_LABEL} | {
        f"{name}/kept": weights[name][1:].flip(0) for name in BY_LABEL
    }


def _start_and_train(run: Path, strategy: str, source: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    settings = {"parallel": {"strategy": strategy}, "train": {"ema_decay": 0.9, "stop_after_steps": 4}}
    training = make_training(run, 2, StartingTask(source=source), **settings)
    weights = _with_kept_rows(whole_weights(training.engine))
    with torch.no_grad(), training.engine.strategy.changing_weights(for_good=False) as held:
        assert training.ema is not None
        for entry in held:
            entry.flat.copy_(training.ema[entry.name])
    average = _with_kept_rows(whole_weights(training.engine))
    train(training)
    return weights, average


def _with_kept_rows(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return weights | {f"{name}/kept": weights[name][1:] for name in BY_LABEL}


def _resume(run: Path, strategy: str, source: Path) -> None:
    settings = {"parallel": {"strategy": strategy}, "train": {"ema_decay": 0.9}}
    train(make_training(run, 2, StartingTask(source=source), 2, **settings))
