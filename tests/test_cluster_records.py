"""What a run knows of its job, on a real Slurm whose jobs are held: nothing here trains."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.front_door import dist_train
from tests.slurm_jobs import LONG, ON_CPUS, field, slurm

pytestmark = [pytest.mark.front_door, pytest.mark.cluster, pytest.mark.matrix]

HELD = ["slurm.extra=[--hold]", "--gpus-per-node", "1"]


def _submit(desk: Path, name: str, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = ["submit", "ticket_routing", *LONG, *ON_CPUS, f"name={name}", *HELD, *words]
    return dist_train(command, desk, **variables)


def _job(desk: Path, name: str) -> str:
    return str(json.loads((desk / "runs" / name / "job.json").read_text())["jobs"][-1])


def _path_with(folder: Path, *lines: str) -> str:
    """A PATH on which sbatch does these lines; `real` in them stands for the true one."""
    folder.mkdir()
    real = f'{shutil.which("sbatch")} "$@"'
    (folder / "sbatch").write_text("\n".join(["#!/bin/bash", *lines, ""]).replace("real", real))
    (folder / "sbatch").chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def test_ctrl_c_while_sbatch_runs_leaves_a_run_that_knows_its_job(cluster: Path, tmp_path: Path) -> None:
    done = _submit(cluster, "interrupted", PATH=_path_with(tmp_path / "bin", "kill -INT $PPID", "real"))
    assert done.returncode == 130, done.stdout + done.stderr
    job = _job(cluster, "interrupted")
    assert f"job {job} is PENDING" in dist_train(["status", "runs/interrupted"], cluster).stdout
    assert dist_train(["cancel", "runs/interrupted"], cluster).returncode == 0
    assert field(job, "JobState") == "CANCELLED"


def test_a_submit_that_is_killed_after_sbatch_finds_its_job_again(cluster: Path, tmp_path: Path) -> None:
    done = _submit(cluster, "killed", PATH=_path_with(tmp_path / "bin", "real", "kill -9 $PPID"))
    assert done.returncode == -9
    assert json.loads((cluster / "runs" / "killed" / "job.json").read_text())["jobs"] == []
    assert "is PENDING" in dist_train(["status", "runs/killed"], cluster).stdout
    assert dist_train(["resume", "runs/killed"], cluster).returncode == 12
    assert dist_train(["cancel", "runs/killed"], cluster).returncode == 0
    assert "PENDING" not in dist_train(["status", "runs/killed"], cluster).stdout


def test_a_submit_that_is_killed_before_sbatch_is_submitted_by_resume(cluster: Path, tmp_path: Path) -> None:
    done = _submit(cluster, "early", PATH=_path_with(tmp_path / "bin", "kill -9 $PPID"))
    assert done.returncode == -9
    assert "not started" in dist_train(["status", "runs/early"], cluster).stdout
    again = dist_train(["resume", "runs/early"], cluster)
    assert again.returncode == 0, again.stderr
    assert field(_job(cluster, "early"), "JobState") == "PENDING"
    assert dist_train(["cancel", "runs/early"], cluster).returncode == 0


def test_a_number_that_belongs_to_another_job_by_now_is_nobodys(cluster: Path) -> None:
    assert _submit(cluster, "old").returncode == 0
    assert _submit(cluster, "new").returncode == 0
    slurm("scancel", _job(cluster, "old"))
    record = cluster / "runs" / "old" / "job.json"
    record.write_text(record.read_text().replace(_job(cluster, "old"), _job(cluster, "new")))
    assert "PENDING" not in dist_train(["status", "runs/old"], cluster).stdout
    refused = dist_train(["cancel", "runs/old"], cluster)
    assert refused.returncode == 2
    assert "is not running" in refused.stderr
    assert field(_job(cluster, "new"), "JobState") == "PENDING"
    slurm("scancel", _job(cluster, "new"))


def test_after_a_run_that_did_not_go_well_is_refused(cluster: Path) -> None:
    assert _submit(cluster, "first").returncode == 0
    assert _submit(cluster, "second", "--after", "runs/first").returncode == 0
    assert f"afterok:{_job(cluster, 'first')}" in field(_job(cluster, "second"), "Dependency")
    assert dist_train(["cancel", "runs/first"], cluster).returncode == 0
    refused = _submit(cluster, "third", "--after", "runs/first")
    assert refused.returncode == 2
    assert "dist-train resume" in refused.stderr
    assert not (cluster / "runs" / "third").exists()


def test_a_run_that_has_a_job_of_its_own_is_in_no_array_and_a_refused_array_leaves_nothing(cluster: Path) -> None:
    words = ["--seeds", "2"]
    bad = _submit(cluster, "array", *words, "slurm.extra=[--hold, --bogus]")
    assert bad.returncode == 1
    assert not (cluster / "runs" / "array").exists()
    assert _submit(cluster, "array", *words).returncode == 0
    task = cluster / "runs" / "array" / "seed-1"
    assert dist_train(["cancel", str(task)], cluster).returncode == 0
    alone = dist_train(["resume", str(task)], cluster)
    assert alone.returncode == 0, alone.stderr
    assert dist_train(["cancel", "runs/array"], cluster).returncode == 0
    refused = _submit(cluster, "array", *words)
    assert refused.returncode == 12, refused.stdout
    assert str(task) in refused.stderr
    assert dist_train(["cancel", str(task)], cluster).returncode == 0
    listed = dist_train(["logs", "runs/array"], cluster)
    assert str(task) in listed.stderr
    many = _submit(cluster, "many", "--seeds", "100000")
    assert many.returncode == 2
    assert "at most" in many.stderr


def test_a_checkpoint_that_is_not_there_is_refused_before_sbatch(cluster: Path) -> None:
    assert _submit(cluster, "untrained").returncode == 0
    busy = dist_train(["submit", "runs/untrained", "--checkpoint", "last"], cluster)
    assert busy.returncode == 12
    assert "--after" in busy.stderr
    assert dist_train(["cancel", "runs/untrained"], cluster).returncode == 0
    none = dist_train(["submit", "runs/untrained", "--checkpoint", "10"], cluster)
    assert none.returncode == 2
    assert "these steps: none" in none.stderr
