"""dist-train scale: a study of one and two ranks, its files, its group in W&B, and a size that dies."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from tests.front_door import TICKET_SETTINGS, dist_train, lines, write_tickets
from tests.wandb_files import read_offline_runs

pytestmark = pytest.mark.front_door

WORDS = [
    *("scale", "ticket_routing", *TICKET_SETTINGS, "model.dropout=0.1"),
    *("--gpus-per-node", "1,2", "--steps", "6", "--warm-up", "8", "--repeat", "2"),
]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The folder of a study in which one repeat was killed."""
    desk = tmp_path_factory.mktemp("desk")
    write_tickets(desk / "tickets.csv")
    folder = desk / "runs" / "study"
    threading.Thread(target=_kill_a_rank, args=(folder / "ddp-1x2-r0",), daemon=True).start()
    done = dist_train([*WORDS, "name=study"], desk, WANDB_MODE="offline")
    return folder, done


def _kill_a_rank(run: Path) -> None:
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        started = [record for record in lines(run / "events.jsonl") if record["event"] == "rank_started"]
        if started:
            os.kill(started[-1]["pid"], signal.SIGKILL)
            return
        time.sleep(0.02)


def test_a_size_that_dies_is_told_with_its_cause_and_the_others_stand(
    study: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, done = study
    assert done.returncode == 15, done.stdout + done.stderr
    first = json.loads((folder / "scale.json").read_text())
    assert list(first["failed"]) == ["ddp-1x2-r0"]
    assert "killed from outside" in first["failed"]["ddp-1x2-r0"]
    assert [entry["repeats"] for entry in first["sizes"]] == [2, 1]
    kept = (folder / "ddp-1x1-r0" / "speed.json").stat().st_mtime_ns
    words = [*WORDS, "name=study"]
    refused = dist_train(words, folder.parent.parent)
    assert refused.returncode == 12
    assert "--resume" in refused.stderr
    other = dist_train([*words, "--mode", "weak", "--resume"], folder.parent.parent)
    assert other.returncode == 2
    assert "mode" in other.stderr
    again = dist_train([*words, "--resume"], folder.parent.parent, WANDB_MODE="offline")
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("== ddp-") == 1
    assert (folder / "ddp-1x1-r0" / "speed.json").stat().st_mtime_ns == kept
    _is_whole(folder, again.stdout)


def _is_whole(folder: Path, said: str) -> None:
    found = json.loads((folder / "scale.json").read_text())
    assert found["failed"] == {}
    assert [(entry["ranks"], entry["repeats"]) for entry in found["sizes"]] == [(1, 2), (2, 2)]
    one, two = found["sizes"]
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert not any("loss" in flag for entry in (one, two) for flag in entry["flags"])
    assert sum(two["split"].values()) == pytest.approx(1.0)
    assert min(two["split"].values()) >= 0
    assert two["split"]["exposed communication"] > 0
    assert one["split"]["exposed communication"] == 0
    assert two["speed_up"] == pytest.approx(two["samples_per_s"] / one["samples_per_s"])
    with open(folder / "scale.csv") as stream:
        assert [row["name"] for row in csv.DictReader(stream)] == ["ddp-1x1", "ddp-1x2"]
    page = (folder / "scale.html").read_text()
    assert page.count("data:image/svg+xml") == 3
    assert "http" not in page.replace("http-equiv", "")
    assert "PREDICTION of ddp, not measured" in said
    runs = {run.name: run for run in read_offline_runs(folder)}
    assert sorted(runs) == ["study/ddp-1x1", "study/ddp-1x2", "study/summary"]
    assert {run.group for run in runs.values()} == {"study"}
    assert [line["repeat"] for line in runs["study/ddp-1x2"].history] == [0] * 6 + [1] * 6
    assert runs["study/ddp-1x2"].summary["samples_per_s"] == pytest.approx(two["samples_per_s"])
    assert runs["study/summary"].summary["scaling/nrows"] == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpus-per-node", "1,x"], "--gpus-per-node is 1,x"),
        (["--gpus-per-node", "1", "--nodes", "2"], "ranks of one machine are no nodes"),
        (["--gpus-per-node", "4096"], "asks for 4096 ranks"),
        (["--gpus-per-node", "1", "--warm-up", "1"], "--warm-up is 1"),
        (["--gpus-per-node", "1", "--strategy", "ddq"], "'ddq' is none of"),
        (["--gpus-per-node", "1", "--resume", "name=new"], "has no study yet"),
    ],
)
def test_what_cannot_be_a_study_is_refused(tmp_path: Path, words: list[str], said: str) -> None:
    done = dist_train(["scale", "ticket_routing/demo", *words], tmp_path)
    assert done.returncode == 2, done.stdout
    assert said in done.stderr
    assert not (tmp_path / "runs").exists()
