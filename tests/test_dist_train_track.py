"""Tracking with the real W&B, offline: one id over restarts, nothing secret written, never in the way."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from dist_train.events import read_lines
from dist_train.rundir import RunDir
from dist_train.track import Tracker, wandb_mode
from tests.fakes import TinyConfig

SECRET = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def _no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_PROJECT", "WANDB_RUN_ID", "WANDB_DIR", "WANDB_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))


def _run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "runs" / "mine")
    run.create()
    return run


def _stored(run: RunDir, *words: str) -> bytes:
    """What W&B's own process has written, which may be a moment after `finish` returned; it holds these words."""
    deadline = time.monotonic() + 20
    while True:
        files = [path for path in (run.path / "wandb").rglob("*") if path.is_file() and not path.is_symlink()]
        content = b"".join(path.read_bytes() for path in files)
        missing = [word for word in words if word.encode() not in content]
        if not missing:
            return content
        assert time.monotonic() < deadline, f"not stored: {missing}"
        time.sleep(0.05)


def test_two_attempts_are_one_offline_wandb_run_and_hold_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("WANDB_PROJECT", "tickets")
    run = _run(tmp_path)
    config = TinyConfig(recipe="tiny", track={"wandb": "offline", "group": "sweep", "tags": ["a"]})
    for attempt, step in ((1, 1), (2, 2)):
        tracker = Tracker(run, config, attempt)
        tracker.log("train", step, 16 * step, {"loss": 1.0 / step})
        tracker.finish({"metrics": {"test": {"accuracy": {"value": 0.5}}}})
    lines = list(read_lines(run.metrics))
    assert [(line["step"], line["attempt"], line["loss"]) for line in lines] == [(1, 1, 1.0), (2, 2, 0.5)]
    run_id = run.wandb_id.read_text().strip()
    assert list((run.path / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb"))
    _stored(run, "train/loss", "tickets", "sweep", "train.global_batch_size", "mine")
    for path in run.path.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path


def test_what_the_config_leaves_open_comes_from_the_variables_of_wandb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = {"WANDB_PROJECT": "from-site", "WANDB_ENTITY": "the-team", "WANDB_RUN_GROUP": "nightly"}
    words |= {"WANDB_JOB_TYPE": "ablation", "WANDB_TAGS": "blue,green", "WANDB_NAME": "a-name"}
    for variable, value in words.items():
        monkeypatch.setenv(variable, value)
    for track in ({}, {"project": "own", "group": "ours", "job_type": "study", "tags": ["red"]}):
        run = RunDir(tmp_path / f"runs{len(track)}" / "mine")
        run.create()
        Tracker(run, TinyConfig(recipe="tiny", track={"wandb": "offline", **track}), 1).finish({})
        expected = [track.get("project", "from-site"), "the-team", track.get("group", "nightly")]
        expected += [track.get("job_type", "ablation"), *track.get("tags", ["blue", "green"]), "a-name"]
        _stored(run, *map(str, expected))


@pytest.mark.parametrize(("upload", "tables", "reports"), [("metrics", 0, 0), ("tables", 1, 0), ("all", 1, 1)])
def test_nothing_but_metrics_leaves_unless_it_is_asked_for(
    tmp_path: Path, upload: str, tables: int, reports: int
) -> None:
    run = _run(tmp_path)
    run.report_html.write_text("a report of this run")
    tracker = Tracker(run, TinyConfig(recipe="tiny", track={"wandb": "offline", "upload": upload}), 1)
    entry = {"value": 0.5, "low": 0.4, "high": 0.6}
    classes = {"a class": {"rows": 3, "precision": entry, "recall": entry, "f1": entry}}
    tracker.finish({"metrics": {"test": {"accuracy": entry}}, "groups": {"test": {"class": classes}}})
    content = _stored(run, "test/accuracy", *(["a class"] if tables else []), *(["report.html"] if reports else []))
    assert (b"a class" in content) == bool(tables)
    assert (b"report.html" in content) == bool(reports)


@pytest.mark.parametrize(
    ("setting", "variable", "key", "expected"),
    [
        ("auto", None, None, "offline"),
        ("auto", None, SECRET, "online"),
        ("auto", "disabled", SECRET, "disabled"),
        ("offline", "online", SECRET, "offline"),
    ],
)
def test_the_mode_is_the_config_then_the_environment_then_whether_there_is_a_key(
    monkeypatch: pytest.MonkeyPatch, setting: str, variable: str | None, key: str | None, expected: str
) -> None:
    for name, value in (("WANDB_MODE", variable), ("WANDB_API_KEY", key)):
        if value is not None:
            monkeypatch.setenv(name, value)
    assert wandb_mode(TinyConfig(recipe="tiny", track={"wandb": setting})) == expected


def test_a_host_that_does_not_answer_costs_seconds_and_not_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "2")
    run = _run(tmp_path)
    began = time.monotonic()
    tracker = Tracker(run, TinyConfig(recipe="tiny", track={"wandb": "online"}), 1)
    tracker.log("train", 1, 16, {"loss": 1.0})
    tracker.finish({})
    assert time.monotonic() - began < 20
    assert [line["loss"] for line in read_lines(run.metrics)] == [1.0]
    assert any(line["event"] == "tracking_offline" for line in read_lines(run.events))
    assert list((run.path / "wandb").glob("offline-run-*")), "what could not be sent is kept"


def test_a_run_that_stops_before_its_end_hands_over_all_that_was_logged(tmp_path: Path) -> None:
    code = """
import os, sys
from dist_train.rundir import RunDir
from dist_train.track import Tracker
from tests.fakes import TinyConfig
run = RunDir(sys.argv[1])
run.create()
tracker = Tracker(run, TinyConfig(recipe="tiny", track={"wandb": "offline"}), 1)
for step in range(1, 21):
    tracker.log("train", step, 16 * step, {"loss": 1.0, "word-of-step": 1000.5 + step})
tracker.close(failed=False)
os._exit(75)
"""
    run = RunDir(tmp_path / "stopped")
    assert (
        subprocess.run([sys.executable, "-c", code, str(run.path)], cwd=Path(__file__).parent.parent).returncode == 75
    )
    _stored(run, "1020.5")
