"""Jobs on a real Slurm: four nodes on loopback, started by tests/cluster/up.sh; skipped where that cannot be."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.front_door import TICKET_SETTINGS, dist_train, environment, final_shards, lines, losses, wait_for_step
from tests.parts import SETTINGS as PART_SETTINGS
from tests.parts import write_parts
from tests.slurm_jobs import (
    LONG,
    ON_CPUS,
    SCRIPTS,
    STEPS,
    assert_nothing_is_left,
    ended_well,
    field,
    slurm,
    submit,
    wait_for_state,
)

pytestmark = [pytest.mark.front_door, pytest.mark.cluster]

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"
SHORT = ["train.steps=100", "eval.every_steps=100"]


@pytest.fixture(scope="module")
def four(cluster: Path) -> Path:
    """The short run on four ranks of one machine."""
    done = dist_train(["run", "ticket_routing", *LONG, *SHORT, "name=four", "--gpus-per-node", "4"], cluster)
    assert done.returncode == 0, done.stdout + done.stderr
    return cluster / "runs" / "four"


def test_two_nodes_of_two_ranks_train_as_one_machine_does_to_the_report(cluster: Path, four: Path) -> None:
    run, job = submit(cluster, "two", *SHORT, per_node=2)
    ended_well(run, job)
    assert losses(run) == losses(four)
    assert final_shards(run) == final_shards(four)
    nodes = next(record for record in lines(run / "events.jsonl") if record["event"] == "nodes")
    assert nodes["hosts"] == ["n1", "n2"]
    assert "n1: ranks 0 to 1; n2: ranks 2 to 3" in next(run.glob("logs/slurm-*.log")).read_text()
    status = dist_train(["status", str(run)], cluster)
    assert "done" in status.stdout, status.stderr
    assert "two: test split" in dist_train(["logs", str(run)], cluster).stdout
    assert_nothing_is_left(run)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--nodes", "5", "--gpus-per-node", "1"], "parallel.nodes (--nodes) is 5, but the partition low has 4"),
        (
            ["--nodes", "1", "--gpus-per-node", "3", "slurm.gpus=gres", "slurm.gpu_memory=16GiB"],
            "the partition low has 2",
        ),
        (["--nodes", "1", "--gpus-per-node", "1", "slurm.time=1-00:00:00"], "is 1440, but the partition low has 60"),
        (["--nodes", "1", "--gpus-per-node", "1", "slurm.partition=gpu"], "the cluster has high, low"),
    ],
)
def test_more_than_the_cluster_has_is_refused_before_sbatch(cluster: Path, words: list[str], said: str) -> None:
    before = slurm("squeue", "-h", "-t", "all", "-o", "%i")
    done = dist_train(["submit", "ticket_routing", *LONG, *ON_CPUS, "name=toomuch", *words], cluster)
    assert done.returncode == 2, done.stdout
    assert said in done.stderr
    assert not (cluster / "runs" / "toomuch").exists()
    assert set(slurm("squeue", "-h", "-t", "all", "-o", "%i").split()) <= set(before.split())


def test_an_array_trains_three_seeds_and_each_comes_back_by_itself(cluster: Path) -> None:
    words = [*LONG, *ON_CPUS, "slurm.cpus_per_node=1", "name=seeds"]
    done = dist_train(["submit", "ticket_routing", *words, "--seeds", "3", "--gpus-per-node", "1"], cluster)
    assert done.returncode == 0, done.stderr
    folder = cluster / "runs" / "seeds"
    array = json.loads((folder / "job.json").read_text())["jobs"][-1]
    for index in (0, 2):  # the last task of an array has the array's own job id
        wait_for_step(folder / f"seed-{index}", 60)
        slurm("scancel", "--batch", "--signal=USR1", f"{array}_{index}")
    busy = dist_train(["submit", "ticket_routing", *words, "--seeds", "3", "--gpus-per-node", "1"], cluster)
    assert busy.returncode == 12, busy.stdout
    for index in range(3):
        run = folder / f"seed-{index}"
        job = json.loads((run / "job.json").read_text())["jobs"][-1]
        wait_for_state(job, "COMPLETED", "FAILED")
        assert (run / "report.html").is_file(), (folder / "logs" / f"slurm-{job}.log").read_text()
        assert field(job, "Restarts") == ("0" if index == 1 else "1")
        assert len(losses(run)) == STEPS
    assert losses(folder / "seed-0") != losses(folder / "seed-1")
    again = dist_train(["submit", "ticket_routing", *words, "--seeds", "3", "--gpus-per-node", "1"], cluster)
    assert "all 3 runs" in again.stdout, again.stderr
    other = [*words, "optim.lr=1", "--seeds", "3", "--gpus-per-node", "1"]
    assert "other settings" in dist_train(["submit", "ticket_routing", *other], cluster).stderr
    listed = dist_train(["status", str(folder)], cluster).stdout
    assert [line.split()[:2] for line in listed.splitlines()] == [[f"seed-{index}", "done"] for index in range(3)]
    assert "seed-2: test split" in dist_train(["logs", str(folder / "seed-2")], cluster).stdout


@pytest.mark.matrix
def test_an_array_tests_on_one_fold_after_the_other(cluster: Path) -> None:
    write_parts(cluster / "parts", count=60)
    words = [*PART_SETTINGS, *ON_CPUS, "slurm.cpus_per_node=1", "name=folds", "train.steps=5", "eval.every_steps=5"]
    done = dist_train(["submit", "defect_detection", *words, "--folds", "2", "--gpus-per-node", "1"], cluster)
    assert done.returncode == 0, done.stderr
    tested = []
    for fold in range(2):
        run = cluster / "runs" / "folds" / f"fold-{fold}"
        job = json.loads((run / "job.json").read_text())["jobs"][-1]
        wait_for_state(job, "COMPLETED", "FAILED")
        assert field(job, "JobState") == "COMPLETED", dist_train(["logs", str(run)], cluster).stdout
        tested.append(set(pq.read_table(run / "predictions" / "test.parquet")["row"].to_pylist()))
    assert not tested[0] & tested[1]
    assert len(tested[0] | tested[1]) == 60
    none = dist_train(["submit", "ticket_routing", *LONG, *ON_CPUS, "--folds", "2", "--gpus-per-node", "1"], cluster)
    assert none.returncode == 2
    assert "data.folds is no known key" in none.stderr


@pytest.mark.matrix
def test_a_trainer_script_trains_as_on_one_machine(cluster: Path) -> None:
    # With a seed, which the example does without.
    text = (EXAMPLES / "trainer_script.py").read_text()
    (cluster / "trainer.py").write_text(
        text.replace("    config = Bert", "    torch.manual_seed(0)\n    config = Bert")
    )
    script = "trainer.py"
    flags, own = ["--gpus-per-node", "2", "--name"], ["--max_steps", "10"]
    done = dist_train(["launch", "--gpus-per-node", "4", "--name", "alone", script, "--", *own], cluster)
    assert done.returncode == 0, done.stderr
    words = ["submit", "--nodes", "2", *flags, "script", script, *ON_CPUS, "--", *own]
    done = dist_train(words, cluster)
    assert done.returncode == 0, done.stderr
    run = cluster / "runs" / "script"
    wait_for_state(json.loads((run / "job.json").read_text())["jobs"][-1], "COMPLETED", "FAILED")
    said = [re.findall(r"'loss': '?[0-9.]+", (cluster / "runs" / name / "logs" / "rank0.log").read_text())
            for name in ("alone", "script")]  # fmt: skip
    assert said[0] == said[1]
    assert said[0], (run / "logs" / "rank0.log").read_text()


@pytest.mark.matrix
def test_zero2_trains_the_same_and_is_evaluated_by_a_dependent_job(cluster: Path, four: Path) -> None:
    run, job = submit(cluster, "zero2", *SHORT, "parallel.strategy=zero2", per_node=2)
    done = dist_train(["submit", str(run), "--checkpoint", "last", "--after", str(run)], cluster)
    assert done.returncode == 0, done.stderr
    evaluation = re.search(r"job +(\d+)", done.stdout)
    assert evaluation is not None
    ended_well(run, job)
    here, there = losses(run), losses(four)
    assert max(abs(here[step] - there[step]) / there[step] for step in range(1, 21)) < 1e-5
    wait_for_state(evaluation[1], "COMPLETED", "FAILED")
    assert field(evaluation[1], "JobState") == "COMPLETED", next(run.glob("logs/slurm-*.log")).read_text()


def _in_an_allocation(desk: Path, nodes: int, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["salloc", f"-N{nodes}", "--cpus-per-task=2", "--time=10", sys.executable, "-m", "launcher", *command],
        cwd=desk,
        env=environment(desk, PYTHONPATH=str(SCRIPTS.parent.parent)),
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.mark.matrix
def test_an_allocation_is_used_by_run(cluster: Path) -> None:
    words = [*TICKET_SETTINGS, "train.steps=20", "eval.every_steps=20", "slurm.gpus=none", "name=allocated"]
    done = _in_an_allocation(cluster, 2, "run", "ticket_routing", *words, "--nodes", "2", "--gpus-per-node", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "n1: ranks 0 to 0; n2: ranks 1 to 1" in done.stdout
    assert (cluster / "runs" / "allocated" / "report.html").is_file()


@pytest.mark.matrix
def test_nodes_that_share_one_machine_are_marked_in_a_scaling_study(cluster: Path) -> None:
    words = [*TICKET_SETTINGS, "model.dropout=0", "slurm.gpus=none", "name=nodes", "--nodes", "1,2,4"]
    words += ["--gpus-per-node", "1", "--steps", "4", "--warm-up", "8", "--repeat", "1"]
    done = _in_an_allocation(cluster, 4, "scale", "ticket_routing", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    one, *several = json.loads((cluster / "runs" / "nodes" / "scale.json").read_text())["sizes"]
    assert [entry["nodes"] for entry in several] == [2, 4]
    assert not any("share one host" in flag for flag in one["flags"])
    for entry in several:
        assert f"its {entry['nodes']} nodes share one host: this is no scaling over machines" in entry["flags"]
        assert entry["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert "share one host" in (cluster / "runs" / "nodes" / "scale.html").read_text()
