"""What can happen to a job on a real Slurm: time limits, preemption, kills, lost nodes, wrong settings."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.front_door import dist_train, final_shards, lines, losses, wait_for_step
from tests.slurm_jobs import (
    SCRIPTS,
    assert_nothing_is_left,
    ended_well,
    field,
    head,
    processes,
    ranks,
    slurm,
    submit,
    wait_for_state,
)

pytestmark = [pytest.mark.front_door, pytest.mark.cluster, pytest.mark.matrix]


def test_time_limits_cost_nothing_and_a_broken_checkout_does_not_matter(
    cluster: Path, whole: Path, tmp_path: Path
) -> None:
    """Three times Slurm tells the script of its time limit, as it does before it."""
    checkout = tmp_path / "checkout"
    for package in ("launcher", "dist_train", "slurm", "recipes"):
        shutil.copytree(SCRIPTS.parent.parent / package, checkout / package)
    run, job = submit(cluster, "limits", "slurm.extra=[--hold]", PYTHONPATH=str(checkout), WANDB_MODE="offline")
    for path in checkout.rglob("*.py"):
        path.write_text("raise RuntimeError('the checkout was edited')\n")
    slurm("scontrol", "release", job)
    for turn in range(3):
        wait_for_step(run, 60 * (turn + 1))
        slurm("scancel", "--batch", "--signal=USR1", job)
        deadline = time.monotonic() + 60
        while int(field(job, "Restarts")) <= turn:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    ended_well(run, job)
    assert field(job, "Restarts") == "3"
    assert losses(run) == losses(whole)
    assert final_shards(run) == final_shards(whole)
    ids = {path.name.rpartition("-")[2] for path in (run / "wandb").glob("offline-run-*")}
    assert ids == {(run / "wandb_id").read_text().strip()}


def test_a_preempted_job_goes_on_where_it_was(cluster: Path, whole: Path) -> None:
    run, job = submit(cluster, "preempted", "slurm.partition=low")
    wait_for_step(run, 60)
    other = slurm("sbatch", "--parsable", "-p", "high", "-N4", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 2")
    wait_for_state(other.strip(), "COMPLETED")
    ended_well(run, job)
    assert field(job, "Restarts") == "1"
    assert losses(run) == losses(whole)


@pytest.mark.parametrize("victim", ["rank", "launcher", "first launcher", "stopped"])
def test_what_is_killed_or_stopped_costs_at_most_one_checkpoint(cluster: Path, whole: Path, victim: str) -> None:
    run, job = submit(cluster, f"killed-{victim.replace(' ', '-')}", "parallel.timeout_s=15")
    wait_for_step(run, 60)
    rank = ranks(run)[1]
    if victim == "rank":
        os.kill(rank, signal.SIGKILL)
    elif victim == "stopped":
        os.kill(rank, signal.SIGSTOP)
    elif victim == "first launcher":
        os.kill(head(run), signal.SIGKILL)
    else:
        next(each for each in processes(run) if "launcher" in each.cmdline()[:6] and each.pid != head(run)).kill()
    ended_well(run, job)
    assert losses(run) == losses(whole)
    resumed = [record["step"] for record in lines(run / "events.jsonl") if record["event"] == "resumed"]
    assert len(resumed) == 1
    assert resumed[0] >= 40  # of the save at step 60 or before, which may be under way
    if victim == "stopped":
        said = next(run.glob("logs/slurm-*.log")).read_text()
        assert "rank 1 (silent since step" in said
        assert all("most recent call" in (run / "logs" / f"rank{rank}.log").read_text() for rank in (0, 1))
    assert_nothing_is_left(run)


def test_a_cancelled_job_is_saved_and_does_not_come_back(cluster: Path) -> None:
    run, job = submit(cluster, "cancelled")
    wait_for_step(run, 60)
    assert dist_train(["cancel", str(run)], cluster).returncode == 0
    wait_for_state(job, "CANCELLED")
    time.sleep(3)
    assert field(job, "JobState") == "CANCELLED"
    saved = [record["step"] for record in lines(run / "events.jsonl") if record["event"] == "checkpoint_committed"]
    assert saved[-1] >= 60
    assert_nothing_is_left(run)
    again = dist_train(["resume", str(run)], cluster)
    assert again.returncode == 0, again.stderr
    ended_well(run, json.loads((run / "job.json").read_text())["jobs"][-1])


def test_a_job_whose_config_is_wrong_ends_once(cluster: Path) -> None:
    run, job = submit(cluster, "wrong", "slurm.extra=[--hold]")
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("lr:", "learning_rate:", 1))
    slurm("scontrol", "release", job)
    wait_for_state(job, "FAILED")
    time.sleep(2)
    assert (field(job, "JobState"), field(job, "ExitCode"), field(job, "Restarts")) == ("FAILED", "2:0", "0")
    assert "learning_rate is no known key" in next(run.glob("logs/slurm-*.log")).read_text()


@contextmanager
def _seen_by_the_second_node(what: Path, at: Path) -> Iterator[None]:
    """`what` lies at `at`, for node n2 alone."""
    config = Path(os.environ["SLURM_CONF"])
    daemon = (config.parent.parent / "run" / "slurmd.n2.pid").read_text().strip()
    inside = ["nsenter", "--target", daemon, "--mount"]
    subprocess.run([*inside, "mount", "--bind", what, at], check=True)
    try:
        yield
    finally:
        subprocess.run([*inside, "umount", at], check=True)


@pytest.mark.parametrize("kind", ["name", "code", "data"])
def test_a_node_that_has_something_else_ends_the_job_within_a_minute(cluster: Path, tmp_path: Path, kind: str) -> None:
    run, job = submit(cluster, f"other-{kind}", "slurm.extra=[--hold]")
    data = Path(json.loads((run / "data.json").read_text())["folder"])
    at, what = {"name": Path("/etc/hosts"), "code": run / "code", "data": data}[kind], tmp_path / "other"
    if kind == "name":
        what.write_text("127.0.0.1 localhost n2\n")
    else:
        shutil.copytree(at, what)
    if kind == "code":
        (what / "dist_train" / "loop.py").open("a").write("\n")
    if kind == "data":
        facts = json.loads((what / "facts.json").read_text())
        (what / "facts.json").write_text(json.dumps({**facts, "fingerprint": "0" * 64}))
    with _seen_by_the_second_node(what, at):
        slurm("scontrol", "release", job)
        began = time.monotonic()
        wait_for_state(job, "FAILED", "COMPLETED")
        seconds = time.monotonic() - began
    said = next(run.glob("logs/slurm-*.log")).read_text()
    assert (field(job, "JobState"), field(job, "Restarts")) == ("FAILED", "0"), said
    words = {"name": "could not reach node 0 at n1:", "code": "has other code than", "data": "has other data than"}
    assert f"config error: node 1 (n2) {words[kind]}" in said
    assert seconds < 60
    assert_nothing_is_left(run)


def test_a_second_signal_ends_at_once_and_the_newest_checkpoint_is_whole(cluster: Path, whole: Path) -> None:
    run, job = submit(cluster, "twice", "parallel.timeout_s=120")
    wait_for_step(run, 60)
    os.kill(ranks(run)[1], signal.SIGSTOP)  # so that the first signal cannot be followed
    slurm("scancel", "--batch", "--signal=USR1", job)
    time.sleep(6)
    assert psutil.pid_exists(head(run))
    slurm("scancel", "--batch", "--signal=USR1", job)
    began = time.monotonic()
    while field(job, "Restarts") == "0":
        assert time.monotonic() - began < 45, "it waited for the rank that is stopped"
        time.sleep(0.2)
    ended_well(run, job)
    assert losses(run) == losses(whole)
    assert_nothing_is_left(run)


def test_a_node_that_dies_costs_at_most_one_checkpoint(cluster: Path, whole: Path) -> None:
    """Last, since it leaves the cluster with a node less."""
    run, job = submit(cluster, "node-lost")
    wait_for_step(run, 60)
    config = Path(os.environ["SLURM_CONF"])
    os.kill(int((config.parent.parent / "run" / "slurmd.n2.pid").read_text()), signal.SIGKILL)
    for pid in ranks(run).values():
        os.kill(pid, signal.SIGSTOP)  # so that there is something left to do when Slurm notices
    ended_well(run, job)
    assert int(field(job, "Restarts")) >= 1
    assert losses(run) == losses(whole)
    assert_nothing_is_left(run)
