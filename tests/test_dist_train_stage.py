"""Prepared data on a node's own disk: copied once a node, whole, verified, found again; the same training from it."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from dist_train import stage
from dist_train.config_io import load, result_fingerprint
from dist_train.errors import ConfigError, CrashError, StorageError
from dist_train.events import log_event
from dist_train.rundir import RunDir
from dist_train.stage import staged_folder
from tests.front_door import dist_train, lines, losses, mounted

RUN = ["ticket_routing/demo", "data.rows=400", "data.vocab_size=600", "data.cache_dir=prepared"]
RUN += ["train.epochs=null", "train.steps=4", "track.log_every_steps=1", "eval.bootstrap_samples=100"]
RUN += ["model.layers=1", "model.width=32", "model.heads=2", "model.feedforward=64", "parallel.processes_per_node=2"]


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "runs" / "first")
    run.create({"config.yaml": "recipe: ticket_routing\ndata:\n  stage_to: /node  # mine.yaml:7\n"})
    return run


@pytest.fixture
def facts(tmp_path: Path) -> dict[str, Any]:
    """A prepared folder with a hard link and a symbolic link in it, and a fetched model beside."""
    prepared, model = tmp_path / "cache" / "tickets-1", tmp_path / "cache" / "hub" / "models--x" / "c0ffee"
    for folder, record in ((prepared / "tokenizer", "facts.json"), (model, "fetched.json")):
        folder.mkdir(parents=True)
        (folder.parent if record == "facts.json" else folder).joinpath(record).write_text("{}")
    (prepared / "train.arrow").write_bytes(os.urandom(3_000_000))
    (model / "model.safetensors").write_bytes(b"weights")
    (prepared / "tokenizer" / "tokenizer.json").symlink_to(model / "model.safetensors")
    os.link(model / "model.safetensors", prepared / "test.arrow")
    return {"folder": str(prepared), "beside": ["../hub/models--x/c0ffee"]}


def _copies(run: RunDir) -> list[int]:
    return [line["copied_bytes"] for line in lines(run.events) if line["event"] == "staged"]


def test_the_copy_is_whole_and_lies_as_the_original_does(run: RunDir, facts: dict[str, Any], tmp_path: Path) -> None:
    staged = staged_folder(run, 1, facts, tmp_path / "node")
    assert staged == tmp_path / "node" / "tickets-1"
    for name in ("train.arrow", "test.arrow", "tokenizer/tokenizer.json", "facts.json"):
        assert (staged / name).read_bytes() == (Path(facts["folder"]) / name).read_bytes()
        assert not (staged / name).is_symlink()
    assert (staged / facts["beside"][0] / "model.safetensors").read_bytes() == b"weights"
    assert os.stat(staged / "test.arrow").st_nlink == 1
    (Path(facts["folder"]) / "baselines.parquet").write_bytes(b"of a report, later")
    assert staged_folder(run, 2, facts, tmp_path / "node") == staged
    assert [copied > 0 for copied in _copies(run)] == [True, False], "the second run finds it again"


def test_a_copy_of_other_content_or_one_that_is_cut_short_is_made_again(
    run: RunDir, facts: dict[str, Any], tmp_path: Path
) -> None:
    staged = staged_folder(run, 1, facts, tmp_path / "node")
    source = Path(facts["folder"])
    os.truncate(staged / "train.arrow", 5)
    staged_folder(run, 2, facts, tmp_path / "node")
    assert (staged / "train.arrow").read_bytes() == (source / "train.arrow").read_bytes()
    (source / "facts.json").write_text('{"fingerprint": "other"}')
    (source / "test.arrow").write_bytes(b"changed")
    staged_folder(run, 3, facts, tmp_path / "node")
    assert (staged / "test.arrow").read_bytes() == b"changed"


def test_a_disk_that_does_not_keep_what_is_written_is_refused(
    run: RunDir, facts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "_sha256", lambda path: "another")
    with pytest.raises(StorageError, match=r"is not what was written: the disk behind data\.stage_to is damaged"):
        staged_folder(run, 1, facts, tmp_path / "node")
    assert not (tmp_path / "node" / "tickets-1").exists()
    assert not list((tmp_path / "node").glob(".tmp-*"))


def test_too_little_space_is_said_before_anything_is_copied(run: RunDir, facts: dict[str, Any], tmp_path: Path) -> None:
    with mounted(tmp_path / "small", "size=1m") as small:
        with pytest.raises(StorageError, match=r"but the copy needs 2\.9 MiB.*Set in: mine\.yaml:7") as refusal:
            staged_folder(run, 1, facts, small)
        assert [path.name for path in small.iterdir()] == [".stage.lock"]
    assert "set data.stage_to to null" in str(refusal.value)
    with pytest.raises(StorageError, match="cannot be written"):
        staged_folder(run, 1, facts, Path("/proc/node"))


def test_the_other_ranks_of_a_node_wait_for_the_one_that_copies(
    run: RunDir, facts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    log_event(run.events, "staged", attempt=1, host=os.uname().nodename)  # of an attempt before
    log_event(run.events, "staged", attempt=2, host="another")
    came: list[Path] = []
    waiting = threading.Thread(target=lambda: came.append(staged_folder(run, 2, facts, tmp_path / "node")))
    waiting.start()
    time.sleep(0.3)
    assert came == []
    monkeypatch.setenv("LOCAL_RANK", "0")
    staged_folder(run, 2, facts, tmp_path / "node")
    waiting.join(5)
    assert came == [tmp_path / "node" / "tickets-1"]
    monkeypatch.setenv("LOCAL_RANK", "1")
    log_event(run.events, "failed", attempt=3, rank=0, code=StorageError.exit_code, message="no space")
    with pytest.raises(StorageError, match="no space"):
        staged_folder(run, 3, facts, tmp_path / "node")


def test_where_data_lies_changes_no_fingerprint_and_the_cache_is_no_place_to_stage_to(tmp_path: Path) -> None:
    plain = load("ticket_routing", ["data.path=synthetic"], site=False).config
    staged = load("ticket_routing", ["data.path=synthetic", "data.stage_to=/x", "data.offline=true"], site=False).config
    assert result_fingerprint(plain) == result_fingerprint(staged)
    with pytest.raises(ConfigError, match=r"data\.stage_to is /c, which is data\.cache_dir itself"):
        load("ticket_routing", ["data.cache_dir=/c", "data.stage_to=/c"], site=False)


@pytest.mark.front_door
def test_two_ranks_train_from_one_copy_as_they_do_without(tmp_path: Path) -> None:
    for name, extra in {"plain": [], "staged": ["data.stage_to=node"]}.items():
        done = dist_train(["run", *RUN, f"name={name}", *extra], tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
    plain, staged = RunDir(tmp_path / "runs" / "plain"), RunDir(tmp_path / "runs" / "staged")
    assert losses(staged.path) == losses(plain.path)
    assert len(losses(plain.path)) == 4
    assert "prepared data to" in done.stdout
    (copied,) = _copies(staged)
    facts = json.loads(staged.data_facts.read_text())
    assert facts == json.loads(plain.data_facts.read_text())
    there = tmp_path / "node" / Path(facts["folder"]).name
    assert copied == sum(entry["bytes"] for entry in json.loads((there / "staged.json").read_text()).values())
    # What the ranks read is the copy: one that cannot be read ends the run.
    for path in [path for path in there.rglob("*") if path.is_file() and path.suffix != ".json"]:
        path.write_bytes(b"\0" * path.stat().st_size)
    done = dist_train(["run", *RUN, "name=spoiled", "data.stage_to=node"], tmp_path)
    assert done.returncode == CrashError.exit_code
