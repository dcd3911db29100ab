"""Jobs on a real Slurm: four nodes on loopback, started by tests/cluster/up.sh; skipped where that cannot be."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.front_door import (
    TICKET_SETTINGS,
    dist_train,
    final_shards,
    lines,
    losses,
    wait_for_step,
    write_tickets,
)

pytestmark = [pytest.mark.front_door, pytest.mark.cluster]

SCRIPTS = Path(__file__).parent / "cluster"
EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"
# Long enough that a test can act while they run.
STEPS = 400
ON_CPUS = ["slurm.gpus=none", "slurm.time=20", "slurm.cpus_per_node=2"]
LONG = [
    *(word for word in TICKET_SETTINGS if not word.startswith(("train.steps", "eval.every_steps"))),
    f"train.steps={STEPS}",
    f"eval.every_steps={STEPS}",
    "eval.bootstrap_samples=100",
]


def _missing() -> str | None:
    programs = ("slurmctld", "slurmd", "sbatch", "munged", "unshare")
    absent = [name for name in programs if shutil.which(name) is None]
    if absent:
        return f"{', '.join(absent)} not installed: apt-get install slurmctld slurmd slurm-client munge"
    return None if os.geteuid() == 0 else "a local cluster needs root"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A user's folder with tickets, on a login node of the cluster."""
    missing = _missing()
    if missing is not None:
        pytest.skip(missing)
    folder = tmp_path_factory.mktemp("slurm") / "cluster"
    done = subprocess.run(
        [SCRIPTS / "up.sh", folder],
        env={**os.environ, "CLUSTER_PORT": "27817"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    if done.returncode != 0:
        pytest.skip(f"a local cluster cannot be started here: {done.stderr.strip()[-300:]}")
    desk = tmp_path_factory.mktemp("desk")
    write_tickets(desk / "tickets.csv")
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(folder / "etc" / "slurm.conf")
    yield desk
    if before is None:
        del os.environ["SLURM_CONF"]
    else:
        os.environ["SLURM_CONF"] = before
    subprocess.run([SCRIPTS / "down.sh", folder], check=True, timeout=60)


@pytest.fixture(scope="module")
def whole(cluster: Path) -> Path:
    """The run of two ranks of one machine that nothing has interrupted."""
    done = dist_train(["run", "ticket_routing", *LONG, "name=whole", "parallel.processes_per_node=2"], cluster)
    assert done.returncode == 0, done.stdout + done.stderr
    return cluster / "runs" / "whole"


def _slurm(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def _submit(desk: Path, name: str, *words: str, nodes: int = 2, per_node: int = 1) -> tuple[Path, str]:
    """Submit the long training. Returns its run directory and job."""
    arguments = ["submit", "ticket_routing", *LONG, *ON_CPUS, f"name={name}", *words]
    done = dist_train([*arguments, "--nodes", str(nodes), "--gpus-per-node", str(per_node)], desk)
    assert done.returncode == 0, done.stdout + done.stderr
    run = desk / "runs" / name
    return run, json.loads((run / "job.json").read_text())["jobs"][-1]


def _field(job: str, name: str) -> str:
    found = re.search(rf"\b{name}=(\S*)", _slurm("scontrol", "show", "job", job, "-o"))
    assert found is not None
    return found[1]


def _wait_for(job: str, *states: str, timeout_s: float = 150) -> None:
    deadline = time.monotonic() + timeout_s
    while _field(job, "JobState") not in states:
        assert time.monotonic() < deadline, _slurm("scontrol", "show", "job", job, "-o")
        time.sleep(0.2)


def _ended_well(run: Path, job: str) -> None:
    _wait_for(job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
    said = next(run.glob("logs/slurm-*.log")).read_text()
    assert _field(job, "JobState") == "COMPLETED", said
    assert (run / "report.html").is_file(), said


def _processes(run: Path) -> list[psutil.Process]:
    """All that belong to the run, of any node."""
    own = psutil.Process()
    others = [process for process in psutil.process_iter(["cmdline"]) if process != own]
    return [process for process in others if str(run) in " ".join(process.info["cmdline"] or [])]


def _assert_nothing_is_left(run: Path) -> None:
    deadline = time.monotonic() + 30
    while _processes(run):
        assert time.monotonic() < deadline, [process.cmdline() for process in _processes(run)]
        time.sleep(0.2)


def _ranks(run: Path) -> dict[int, int]:
    """Process of each rank of the newest attempt, of both nodes."""
    records = [*lines(run / "events.jsonl"), *lines(run / "logs" / "events-node1.jsonl")]
    started = [record for record in records if record["event"] == "rank_started"]
    newest = max(record["attempt"] for record in started)
    return {record["rank"]: record["pid"] for record in started if record["attempt"] == newest}


def test_two_nodes_train_as_one_machine_does_to_the_report(cluster: Path, whole: Path) -> None:
    run, job = _submit(cluster, "two")
    _ended_well(run, job)
    assert losses(run) == losses(whole)
    assert final_shards(run) == final_shards(whole)
    nodes = next(record for record in lines(run / "events.jsonl") if record["event"] == "nodes")
    assert nodes["hosts"] == ["n1", "n2"]
    assert "n1: ranks 0 to 0; n2: ranks 1 to 1" in next(run.glob("logs/slurm-*.log")).read_text()
    status = dist_train(["status", str(run)], cluster)
    assert "done" in status.stdout, status.stderr
    assert "two: test split" in dist_train(["logs", str(run)], cluster).stdout
    _assert_nothing_is_left(run)


def test_time_limits_cost_nothing(cluster: Path, whole: Path) -> None:
    """Three times Slurm tells the script of its time limit; the checkout is broken meanwhile."""
    run, job = _submit(cluster, "limits")
    for turn in range(3):
        wait_for_step(run, 60 * (turn + 1))
        _slurm("scancel", "--batch", "--signal=USR1", job)
        deadline = time.monotonic() + 60
        while int(_field(job, "Restarts")) <= turn:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    _ended_well(run, job)
    assert _field(job, "Restarts") == "3"
    assert losses(run) == losses(whole)
    assert final_shards(run) == final_shards(whole)


def test_a_preempted_job_goes_on_where_it_was(cluster: Path, whole: Path) -> None:
    run, job = _submit(cluster, "preempted", "slurm.partition=low")
    wait_for_step(run, 60)
    other = _slurm("sbatch", "--parsable", "-p", "high", "-N4", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 2")
    _wait_for(other.strip(), "COMPLETED")
    _ended_well(run, job)
    assert _field(job, "Restarts") == "1"
    assert losses(run) == losses(whole)


@pytest.mark.parametrize("victim", ["rank", "launcher", "stopped"])
def test_what_is_killed_or_stopped_costs_at_most_one_checkpoint(cluster: Path, whole: Path, victim: str) -> None:
    run, job = _submit(cluster, f"killed-{victim}", "parallel.timeout_s=15")
    wait_for_step(run, 60)
    rank = _ranks(run)[1]
    if victim == "rank":
        os.kill(rank, signal.SIGKILL)
    elif victim == "stopped":
        os.kill(rank, signal.SIGSTOP)
    else:
        next(each for each in _processes(run) if "launcher" in each.cmdline()[:6] and each.pid != _head(run)).kill()
    _ended_well(run, job)
    assert losses(run) == losses(whole)
    resumed = [record["step"] for record in lines(run / "events.jsonl") if record["event"] == "resumed"]
    assert len(resumed) == 1
    assert resumed[0] >= 50
    if victim == "stopped":
        said = next(run.glob("logs/slurm-*.log")).read_text()
        assert "rank 1 (silent since step" in said
        assert all("most recent call" in (run / "logs" / f"rank{rank}.log").read_text() for rank in (0, 1))
    _assert_nothing_is_left(run)


def _head(run: Path) -> int:
    return int((run / ".head.pid").read_text())


def test_a_cancelled_job_is_saved_and_does_not_come_back(cluster: Path) -> None:
    run, job = _submit(cluster, "cancelled")
    wait_for_step(run, 60)
    assert dist_train(["cancel", str(run)], cluster).returncode == 0
    _wait_for(job, "CANCELLED")
    time.sleep(3)
    assert _field(job, "JobState") == "CANCELLED"
    saved = [record["step"] for record in lines(run / "events.jsonl") if record["event"] == "checkpoint_committed"]
    assert saved[-1] >= 60
    _assert_nothing_is_left(run)
    again = dist_train(["resume", str(run)], cluster)
    assert again.returncode == 0, again.stderr
    _ended_well(run, json.loads((run / "job.json").read_text())["jobs"][-1])
