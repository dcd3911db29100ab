"""What the docs tell a user to write and type, word for word."""

from __future__ import annotations

import difflib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.front_door import dist_train, environment, lines

pytestmark = pytest.mark.front_door

DOCS = Path(__file__).parent.parent / "docs"
QUICK = ["eval.bootstrap_samples=100", "track.log_every_steps=1"]


def _blocks(text: str, kind: str) -> list[str]:
    """The fenced blocks of one language."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return [block for language, block in fenced if language == kind]


@pytest.fixture(scope="module")
def tutorial(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A desk on which the tutorial's files lie, its data is written, and its three commands have run."""
    desk = tmp_path_factory.mktemp("tutorial")
    text = (DOCS / "tutorial.md").read_text()
    (desk / "diabetes").mkdir()
    (desk / "diabetes" / "recipe.yaml").write_text(_blocks(text, "yaml")[0])
    (desk / "diabetes" / "task.py").write_text(_blocks(text, "python")[0])
    data, commands = _blocks(text, "")
    subprocess.run([sys.executable, *shlex.split(data)[1:]], cwd=desk, check=True)
    for command in commands.splitlines():
        # One pass over the data is enough to see that it works.
        extra = ["train.epochs=2", *QUICK] if " run " in command else []
        done = dist_train([*shlex.split(command)[1:], *extra], desk)
        assert done.returncode == 0, done.stdout + done.stderr
    return desk


def test_the_tutorials_recipe_is_no_longer_than_it_says() -> None:
    text = (DOCS / "tutorial.md").read_text()
    written = [_blocks(text, "yaml")[0], _blocks(text, "python")[0]]
    assert sum(part.count("\n") for part in written) <= 80


def test_the_tutorials_report_has_intervals_and_the_error_of_each_cohort(tutorial: Path) -> None:
    for name in ("first", "sharded"):
        report = json.loads((tutorial / "runs" / name / "report.json").read_text())
        assert set(report["metrics"]["test"]) == {"r2", "mae", "rmse"}
        for entry in report["metrics"]["test"].values():
            assert entry["low"] <= entry["value"] <= entry["high"]
        cohorts = report["groups"]["test"]["cohort"]
        assert sum(cohort["rows"] for cohort in cohorts.values()) == report["data"]["splits"]["test"]["rows"] == 66
        assert "By cohort" in (tutorial / "runs" / name / "report.md").read_text()


def test_the_tutorials_model_trains_alike_on_two_ranks_under_zero2(tutorial: Path) -> None:
    plan = json.loads((tutorial / "runs" / "sharded" / "plan.json").read_text())
    assert (plan["strategy"], plan["world_size"]) == ("zero2", 2)
    losses = {
        name: [line["loss"] for line in lines(tutorial / "runs" / name / "metrics.jsonl") if line["split"] == "train"]
        for name in ("first", "sharded")
    }
    assert losses["sharded"] == pytest.approx(losses["first"], rel=1e-5)
    assert len((tutorial / "answers.csv").read_text().splitlines()) == 443


def test_the_tutorials_baseline_and_its_lines_of_python_work(tutorial: Path) -> None:
    blocks = _blocks((DOCS / "tutorial.md").read_text(), "python")
    with open(tutorial / "diabetes" / "task.py", "a") as stream:
        stream.write("\n\n" + blocks[1])
    (tutorial / "notebook.py").write_text(blocks[2])
    done = subprocess.run(
        [sys.executable, "notebook.py"],
        cwd=tutorial,
        env=environment(tutorial, PYTHONPATH=str(DOCS.parent)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{tutorial}/runs/notebook/report.html" in done.stdout
    report = json.loads((tutorial / "runs" / "notebook" / "report.json").read_text())
    assert "linear regression" in report["verdicts"][0]
    assert report["data"]["split"]["method"] == "random"


@pytest.mark.parametrize("name", ["trainer", "accelerate"])
def test_the_differences_in_the_port_guide_are_those_of_the_files(name: str) -> None:
    guide = (DOCS / "porting.md").read_text()
    old = (DOCS / "examples" / f"{name}_script.py").read_text().splitlines()
    new = (DOCS / "examples" / f"ported_{name}" / "task.py").read_text().splitlines()
    recipe = (DOCS / "examples" / f"ported_{name}" / "recipe.yaml").read_text()
    diff = list(difflib.unified_diff(old, new, f"{name}_script.py", f"ported_{name}/task.py", lineterm="", n=1))
    assert "```diff\n" + "\n".join(diff) + "\n```" in guide
    assert f"```yaml\n{recipe}```" in guide
    written = [line for line in diff if line.startswith("+") and not line.startswith("+++")]
    assert len(written) + recipe.count("\n") <= 40


@pytest.mark.parametrize("name", ["trainer", "accelerate"])
def test_a_ported_script_trains_on_two_ranks_under_zero2(name: str, tmp_path: Path) -> None:
    settings = ["name=ported", "parallel.processes_per_node=2", "parallel.strategy=zero2", *QUICK]
    done = dist_train(["run", str(DOCS / "examples" / f"ported_{name}"), *settings], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 x cpu, zero2" in done.stdout
    losses = [line["loss"] for line in lines(tmp_path / "runs/ported/metrics.jsonl") if line["split"] == "train"]
    assert losses[-1] < losses[0]
    report = json.loads((tmp_path / "runs/ported/report.json").read_text())
    assert report["metrics"]["test"]["accuracy"]["value"] > 0.2
