"""Weekly retraining through the real command, word for word as the recipe's README has it."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from tests.front_door import dist_train, lines
from tests.test_recipes_ticket_routing_retrain import WEEK1, WEEK2, write_week

pytestmark = pytest.mark.front_door

README = Path(__file__).parent.parent / "recipes" / "ticket_routing" / "README.md"
TICKETS = """extends: ticket_routing
data:
  label_column: queue
  cache_dir: prepared
  vocab_size: 600
model:
  layers: 1
  width: 32
  heads: 2
  feedforward: 64
train:
  steps: 8
eval:
  bootstrap_samples: 100
parallel:
  processes_per_node: 2
"""


def test_two_weeks_as_the_readme_says(tmp_path: Path) -> None:
    section = README.read_text().partition("## Weekly retraining")[2]
    commands = section.split("```")[1].strip().splitlines()
    assert len(commands) == 3
    (tmp_path / "tickets.yaml").write_text(TICKETS)
    write_week(tmp_path / "week1.csv", WEEK1, 1)
    write_week(tmp_path / "week2.csv", WEEK2, 2)
    outputs = []
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "dist-train"
        done = dist_train(arguments, tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        outputs.append(done.stdout)
    first, second = tmp_path / "runs" / "week1", tmp_path / "runs" / "week2"
    told = "labels         5 kept; new: Purchasing, Telephony; removed: Software"
    assert told not in outputs[0]
    step = json.loads((first / "best" / "dist_train.json").read_text())["step"]
    assert f"started from   {first}/best (run week1, step {step})" in outputs[1]
    assert told in outputs[1]
    assert told in outputs[2]
    assert re.search(r"labels of this run alone\s+│ Software\s+│ Purchasing, Telephony", outputs[2])
    assert re.search(r"model.init_from\s+│ None\s+│ /\S", outputs[2])
    assert re.search(r"Access\s+│ \S+ \[.*\]\s+│ \d+\s+│ \S+ \[", outputs[2]), "shared queues side by side"
    assert re.search(r"Telephony\s+│ -\s+│ -\s+│ \S+ \[", outputs[2])
    report = json.loads((second / "report.json").read_text())
    assert report["started_from"]["labels"]["new"] == ["Purchasing", "Telephony"]
    assert json.loads((first / "report.json").read_text())["started_from"] is None
    text, html = (second / "report.md").read_text(), (second / "report.html").read_text()
    assert f"## Started from\n\nRun week1, step {step}:" in text
    assert "| labels new | 2 | Purchasing, Telephony |" in text
    assert "| labels removed | 1 | Software |" in text
    assert "<dt>labels new</dt><dd>Purchasing, Telephony</dd>" in html
    assert "Started from" not in (first / "report.html").read_text()
    _assert_resume_needs_no_source(tmp_path, second, first)


def _assert_resume_needs_no_source(desk: Path, run: Path, source: Path) -> None:
    """Week 3 stops half-way, the earlier runs are removed, and it goes on."""
    arguments = [
        "tickets.yaml",
        "name=week3",
        "data.path=week2.csv",
        "data.split_seed=1",
        f"model.init_from={run}/best",
    ]
    stopped = dist_train(["run", *arguments, "train.stop_after_steps=4"], desk)
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    assert "rows were trained on by the model that this run starts from" in stopped.stdout
    shutil.rmtree(run)
    shutil.rmtree(source)
    resumed = dist_train(["resume", "runs/week3", "train.stop_after_steps=null"], desk)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "resumed at step 4" in resumed.stdout
    assert "going on with the prepared copy" in resumed.stdout
    assert lines(desk / "runs" / "week3" / "events.jsonl")[-1]["event"] == "finished"
    refused = dist_train(["run", *arguments, "name=week4"], desk)
    assert refused.returncode == 3
    assert f"model.init_from is {run}/best, but there is no such folder" in refused.stderr
    assert "Set in: model.init_from: command line." in refused.stderr
    assert not (desk / "runs" / "week4").exists()
