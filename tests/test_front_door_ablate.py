"""A study is a folder of ordinary runs: broken off at any moment, the same command goes on with it."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest

from tests.front_door import TICKET_SETTINGS, alive, dist_train, lines, start, wait_for_step, write_tickets

pytestmark = pytest.mark.front_door

RECIPE = """\
extends: ticket_routing
ladder:
  - "plain: model.dropout=0 task.label_smoothing=0"
  - "+ smoothing: task.label_smoothing=0.2"
"""
STEPS = 40
STUDY = ["ablate", "mine.yaml", *TICKET_SETTINGS, f"train.steps={STEPS}", "eval.every_steps=40", "name=study"]
RUNS = ["plain-s0", "smoothing-s0", "plain-s1", "smoothing-s1"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    write_tickets(folder / "tickets.csv", 400)
    (folder / "mine.yaml").write_text(RECIPE)
    return folder


def test_a_study_that_was_broken_off_goes_on_and_tells_what_each_rung_adds(place: Path) -> None:
    study = place / "runs" / "study"
    process = start([*STUDY, "--seeds", "2"], place)
    wait_for_step(study / "smoothing-s0", 12)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert re.search(r"Go on with the study: dist-train ablate mine.yaml .* --seeds 2", output)
    before = {path: path.stat().st_mtime_ns for path in sorted((study / "plain-s0").rglob("*")) if path.is_file()}
    assert (study / "plain-s0" / "report.json") in before

    alone = dist_train([*STUDY, "--seeds", "2", "--only", "3"], place)
    assert alone.returncode == 0, alone.stdout + alone.stderr
    assert "Not there yet, or failed: smoothing-s0, plain-s1" in alone.stdout

    done = dist_train([*STUDY, "--seeds", "2"], place)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(path.name for path in study.iterdir() if path.is_dir()) == sorted(RUNS)
    assert {path: path.stat().st_mtime_ns for path in before} == before, "a finished run is not touched"
    attempts = {line["attempt"] for line in lines(study / "smoothing-s0" / "metrics.jsonl")}
    assert attempts == {1, 2}, "the run that was broken off was resumed"

    summary = json.loads((study / "ablation.json").read_text())
    assert [entry["rung"] for entry in summary["rungs"]] == ["plain", "+ smoothing"]
    assert summary["missing"] == []
    scores = [
        [json.loads((study / f"{rung}-s{seed}" / "report.json").read_text())["metrics"]["test"] for seed in (0, 1)]
        for rung in ("plain", "smoothing")
    ]
    for metric in ("accuracy", "log_loss"):
        means = [sum(each[metric]["value"] for each in of_rung) / 2 for of_rung in scores]
        assert [entry["metrics"][metric]["mean"] for entry in summary["rungs"]] == pytest.approx(means)
        difference = summary["rungs"][1]["to_rung_before"]["metrics"][metric]
        assert difference["value"] == pytest.approx(means[1] - means[0])
        assert difference["low"] <= difference["value"] <= difference["high"]
    assert "| + smoothing | 2 |" in (study / "ablation.md").read_text()
    assert "+ smoothing" in done.stdout


def test_a_run_of_the_study_is_what_its_settings_typed_would_be(place: Path) -> None:
    kept = (place / "runs" / "study" / "smoothing-s1" / "config.yaml").read_text()
    assert re.search(r"^ladder: null", kept, re.MULTILINE)
    assert re.search(r"^seed: 1", kept, re.MULTILINE)
    assert re.search(r"label_smoothing: 0.2", kept)
    assert re.search(r"dropout: 0.0", kept)


def test_what_is_wrong_is_said_before_anything_runs(place: Path) -> None:
    (place / "typo.yaml").write_text(RECIPE.replace("task.label_smoothing=0.2", "task.label_smothing=0.2"))
    refused = dist_train(["ablate", "typo.yaml", *TICKET_SETTINGS, "name=typo"], place)
    assert refused.returncode == 2
    assert "the rung '+ smoothing'" in refused.stderr
    assert "Did you mean task.label_smoothing" in refused.stderr
    assert not (place / "runs" / "typo").exists()
    other = dist_train([*STUDY, "optim.lr=1e-3", "--seeds", "2", "--only", "0"], place)
    assert other.returncode == 2
    assert "is a run of other settings than this study's" in other.stderr
    assert "Not there yet, or failed: plain-s0, smoothing-s0, plain-s1, smoothing-s1" in other.stdout
    beyond = dist_train([*STUDY, "--seeds", "2", "--only", "4"], place)
    assert beyond.returncode == 2
    assert "the runs 0 to 3" in beyond.stderr
    listed = dist_train([*STUDY, "--seeds", "2", "--list"], place)
    assert [line.split()[1] for line in listed.stdout.splitlines()] == RUNS


def test_finished_runs_are_not_kept_for_files_that_have_changed(place: Path) -> None:
    write_tickets(place / "tickets.csv", 401)
    refused = dist_train([*STUDY, "--seeds", "2", "--only", "0"], place)
    assert refused.returncode == 2
    assert "or how it is prepared, has changed since" in refused.stderr
    assert "another name=..." in refused.stderr
    assert "Not there yet, or failed: plain-s0, smoothing-s0, plain-s1, smoothing-s1" in refused.stdout


def test_a_study_in_the_background_outlives_its_command_and_can_be_stopped(place: Path) -> None:
    words = [word for word in STUDY if not word.startswith("name=")] + ["name=behind", "train.steps=4000"]
    done = dist_train([*words, "--seeds", "1", "--background"], place)
    assert done.returncode == 0, done.stderr
    pid = int(re.search(r"kill -INT (\d+)", done.stdout)[1])  # type: ignore[index]
    assert alive(pid)
    wait_for_step(place / "runs" / "behind" / "plain-s0", 5)
    os.kill(pid, signal.SIGINT)
    deadline = time.monotonic() + 60
    while alive(pid):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    log = (place / "runs" / "behind" / "ablate.log").read_text()
    assert "Go on with the study" in log
