"""Saves in the background: the state may change at once, failures reach every rank, and the next save waits."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dist_train import save as save_module
from dist_train.checkpoint import Reader
from dist_train.checkpoint_files import committed_steps, newest_valid
from dist_train.errors import StorageError
from dist_train.held import whole
from dist_train.peak import measured
from dist_train.save import Saver
from dist_train.scaler import LossScaler

ENGINE: Any = SimpleNamespace(rank=0, world_size=1, device=torch.device("cpu"), gather_objects=lambda value: [value])


def _saver(root: Path, asynchronous: bool = True) -> tuple[Saver, list[int]]:
    commits: list[int] = []
    return Saver(root, ENGINE, asynchronous, lambda step, name: commits.append(step)), commits


def _saved(root: Path) -> torch.Tensor:
    manifest, damages = newest_valid(root)
    assert manifest is not None
    assert not damages
    return Reader(root / f"step-{manifest['step']:08d}", manifest).whole("model/")["w"]


def test_what_changes_after_the_start_of_a_save_is_not_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    write = save_module.files.write_shard
    monkeypatch.setattr(save_module.files, "write_shard", lambda *a: (go.wait(10), write(*a))[1])
    weight = torch.arange(6.0).view(2, 3)
    saver, commits = _saver(tmp_path)
    saver.start([whole("model/w", weight)], 1, {})
    weight.zero_()
    assert commits == []
    assert saver.wishes() == (False, False)
    go.set()
    saver.finish()
    assert commits == [1]
    assert torch.equal(_saved(tmp_path), torch.arange(6.0).view(2, 3))


def test_a_save_is_committed_once_all_ranks_have_said_that_they_wrote(tmp_path: Path) -> None:
    saver, commits = _saver(tmp_path)
    saver.start([whole("model/w", torch.ones(3))], 7, {})
    for _ in range(200):
        written, failed = saver.wishes()
        saver.heard(float(written), float(failed))
        if commits:
            break
        threading.Event().wait(0.01)
    assert commits == [7]
    saver.finish()
    assert committed_steps(tmp_path) == [7]


def test_a_full_disk_in_the_background_ends_the_training_at_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(save_module.files, "write_shard", full)
    saver, commits = _saver(tmp_path)
    saver.start([whole("model/w", torch.ones(3))], 7, {})
    for _ in range(200):
        if saver.wishes()[1]:
            break
        threading.Event().wait(0.01)
    with pytest.raises(StorageError, match="the disk is full"):
        saver.heard(0.0, 1.0)
    assert commits == []
    assert committed_steps(tmp_path) == []


def test_a_save_that_fails_in_another_way_commits_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(save_module.files, "write_shard", broken)
    saver, commits = _saver(tmp_path)
    saver.start([whole("model/w", torch.ones(3))], 7, {})
    with pytest.raises(StorageError, match="RuntimeError: no memory"):
        saver.finish()
    assert commits == []
    assert committed_steps(tmp_path) == []


def test_a_save_that_stops_training_is_committed_when_it_returns(tmp_path: Path) -> None:
    saver, commits = _saver(tmp_path, asynchronous=False)
    saver.start([whole("model/w", torch.ones(3))], 2, {})
    assert commits == [2]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_save_takes_no_more_memory_than_one_more_share(tmp_path: Path, asynchronous: bool) -> None:
    held = [whole(f"model/{index}", torch.ones(2**20)) for index in range(8)]
    share = sum(entry.flat.nbytes for entry in held)
    saver, _ = _saver(tmp_path, asynchronous)
    with measured(torch.device("cpu")) as peak:
        saver.start(held, 1, {})
        saver.finish()
    assert peak.peak - peak.before <= 1.1 * share


def test_the_loss_scale_halves_on_overflow_and_doubles_after_a_long_time_without() -> None:
    scaler = LossScaler(torch.device("cpu"))
    bad, good = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    start = float(scaler.scale)
    scaler.update(bad)
    assert float(scaler.scale) == start / 2
    for _ in range(1999):
        scaler.update(good)
    assert float(scaler.scale) == start / 2
    scaler.update(good)
    assert float(scaler.scale) == start
    for _ in range(40):
        scaler.update(bad)
    assert float(scaler.scale) == 1.0
    assert float(scaler.at_bottom()) == 1.0
    again = LossScaler(torch.device("cpu"))
    again.load_state_dict(scaler.state_dict())
    assert float(again.scale) == 1.0
