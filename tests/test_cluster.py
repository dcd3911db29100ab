"""Jobs on a real Slurm: four nodes on loopback, started by tests/cluster/up.sh; skipped where that cannot be."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from launcher.meeting import free_port
from tests.front_door import (
    TICKET_SETTINGS,
    dist_train,
    environment,
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
    rights = "mount --bind /etc/hosts /etc/hosts && hostname n1 && mknod $(mktemp -u) c 1 3"
    if os.geteuid() != 0 or subprocess.run(["unshare", "-mu", "sh", "-c", rights], capture_output=True).returncode:
        return "a local cluster needs root, namespaces of its own and device files"
    return None


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A user's folder with tickets, on a login node of the cluster."""
    missing = _missing()
    if missing is not None:
        pytest.skip(missing)
    folder = tmp_path_factory.mktemp("slurm") / "cluster"
    done = subprocess.run(
        [SCRIPTS / "up.sh", folder],
        env={**os.environ, "CLUSTER_PORT": str(free_port())},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    if done.returncode != 0:
        subprocess.run([SCRIPTS / "down.sh", folder], check=True, timeout=60)
        pytest.fail(f"the local cluster did not start: {done.stderr.strip()[-300:]}")
    desk = tmp_path_factory.mktemp("desk")
    write_tickets(desk / "tickets.csv")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "etc" / "slurm.conf"))
        # One thread a rank, on one node as on two: sums of floats depend on it.
        patch.setenv("OMP_NUM_THREADS", "1")
        yield desk
    subprocess.run([SCRIPTS / "down.sh", folder], check=True, timeout=60)


@pytest.fixture(scope="module")
def whole(cluster: Path) -> Path:
    """The run of two ranks of one machine that nothing has interrupted."""
    done = dist_train(["run", "ticket_routing", *LONG, "name=whole", "parallel.processes_per_node=2"], cluster)
    assert done.returncode == 0, done.stdout + done.stderr
    return cluster / "runs" / "whole"


def _slurm(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def _submit(desk: Path, name: str, *words: str, per_node: int = 1, **variables: str) -> tuple[Path, str]:
    """Submit the long training on two nodes. Returns its run directory and job."""
    arguments = ["submit", "ticket_routing", *LONG, *ON_CPUS, f"name={name}", *words]
    done = dist_train([*arguments, "--nodes", "2", "--gpus-per-node", str(per_node)], desk, **variables)
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


def test_time_limits_cost_nothing_and_a_broken_checkout_does_not_matter(
    cluster: Path, whole: Path, tmp_path: Path
) -> None:
    """Three times Slurm tells the script of its time limit, as it does before it."""
    checkout = tmp_path / "checkout"
    for package in ("launcher", "dist_train", "slurm", "recipes"):
        shutil.copytree(SCRIPTS.parent.parent / package, checkout / package)
    run, job = _submit(cluster, "limits", "slurm.extra=[--hold]", PYTHONPATH=str(checkout), WANDB_MODE="offline")
    for path in checkout.rglob("*.py"):
        path.write_text("raise RuntimeError('the checkout was edited')\n")
    _slurm("scontrol", "release", job)
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
    ids = {path.name.rpartition("-")[2] for path in (run / "wandb").glob("offline-run-*")}
    assert ids == {(run / "wandb_id").read_text().strip()}


def test_a_preempted_job_goes_on_where_it_was(cluster: Path, whole: Path) -> None:
    run, job = _submit(cluster, "preempted", "slurm.partition=low")
    wait_for_step(run, 60)
    other = _slurm("sbatch", "--parsable", "-p", "high", "-N4", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 2")
    _wait_for(other.strip(), "COMPLETED")
    _ended_well(run, job)
    assert _field(job, "Restarts") == "1"
    assert losses(run) == losses(whole)


@pytest.mark.parametrize("victim", ["rank", "launcher", "first launcher", "stopped"])
def test_what_is_killed_or_stopped_costs_at_most_one_checkpoint(cluster: Path, whole: Path, victim: str) -> None:
    run, job = _submit(cluster, f"killed-{victim.replace(' ', '-')}", "parallel.timeout_s=15")
    wait_for_step(run, 60)
    rank = _ranks(run)[1]
    if victim == "rank":
        os.kill(rank, signal.SIGKILL)
    elif victim == "stopped":
        os.kill(rank, signal.SIGSTOP)
    elif victim == "first launcher":
        os.kill(_head(run), signal.SIGKILL)
    else:
        next(each for each in _processes(run) if "launcher" in each.cmdline()[:6] and each.pid != _head(run)).kill()
    _ended_well(run, job)
    assert losses(run) == losses(whole)
    resumed = [record["step"] for record in lines(run / "events.jsonl") if record["event"] == "resumed"]
    assert len(resumed) == 1
    assert resumed[0] >= 40  # of the save at step 60 or before, which may be under way
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


def test_a_job_whose_config_is_wrong_ends_once(cluster: Path) -> None:
    run, job = _submit(cluster, "wrong", "slurm.extra=[--hold]")
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("lr:", "learning_rate:", 1))
    _slurm("scontrol", "release", job)
    _wait_for(job, "FAILED")
    time.sleep(2)
    assert (_field(job, "JobState"), _field(job, "ExitCode"), _field(job, "Restarts")) == ("FAILED", "2:0", "0")
    assert "learning_rate is no known key" in next(run.glob("logs/slurm-*.log")).read_text()


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
    before = _slurm("squeue", "-h", "-t", "all")
    done = dist_train(["submit", "ticket_routing", *LONG, *ON_CPUS, "name=toomuch", *words], cluster)
    assert done.returncode == 2, done.stdout
    assert said in done.stderr
    assert not (cluster / "runs" / "toomuch").exists()
    assert _slurm("squeue", "-h", "-t", "all") == before


def test_an_array_trains_three_seeds_and_each_comes_back_by_itself(cluster: Path) -> None:
    words = [*LONG, *ON_CPUS, "slurm.cpus_per_node=1", "name=seeds"]
    done = dist_train(["submit", "ticket_routing", *words, "--seeds", "3", "--gpus-per-node", "1"], cluster)
    assert done.returncode == 0, done.stderr
    folder = cluster / "runs" / "seeds"
    array = json.loads((folder / "job.json").read_text())["jobs"][-1]
    for index in (0, 2):  # the last task of an array has the array's own job id
        wait_for_step(folder / f"seed-{index}", 60)
        _slurm("scancel", "--batch", "--signal=USR1", f"{array}_{index}")
    busy = dist_train(["submit", "ticket_routing", *words, "--seeds", "3", "--gpus-per-node", "1"], cluster)
    assert busy.returncode == 12, busy.stdout
    for index in range(3):
        run = folder / f"seed-{index}"
        job = json.loads((run / "job.json").read_text())["jobs"][-1]
        _wait_for(job, "COMPLETED", "FAILED")
        assert (run / "report.html").is_file(), (folder / "logs" / f"slurm-{job}.log").read_text()
        assert _field(job, "Restarts") == ("0" if index == 1 else "1")
        assert len(losses(run)) == STEPS
    assert losses(folder / "seed-0") != losses(folder / "seed-1")
    again = dist_train(["submit", "ticket_routing", *words, "--seeds", "3", "--gpus-per-node", "1"], cluster)
    assert "all 3 runs" in again.stdout, again.stderr
    other = [*words, "optim.lr=1", "--seeds", "3", "--gpus-per-node", "1"]
    assert "other settings" in dist_train(["submit", "ticket_routing", *other], cluster).stderr
    listed = dist_train(["status", str(folder)], cluster).stdout
    assert [line.split()[:2] for line in listed.splitlines()] == [[f"seed-{index}", "done"] for index in range(3)]
    assert "seed-2: test split" in dist_train(["logs", str(folder / "seed-2")], cluster).stdout


def test_a_trainer_script_trains_as_on_one_machine(cluster: Path) -> None:
    # With a seed, which the example does without.
    text = (EXAMPLES / "trainer_script.py").read_text()
    (cluster / "trainer.py").write_text(
        text.replace("    config = Bert", "    torch.manual_seed(0)\n    config = Bert")
    )
    script = "trainer.py"
    flags, own = ["--gpus-per-node", "1", "--name"], ["--max_steps", "10"]
    done = dist_train(["launch", "--gpus-per-node", "2", "--name", "alone", script, "--", *own], cluster)
    assert done.returncode == 0, done.stderr
    words = ["submit", "--nodes", "2", *flags, "script", script, *ON_CPUS, "--", *own]
    done = dist_train(words, cluster)
    assert done.returncode == 0, done.stderr
    run = cluster / "runs" / "script"
    _wait_for(json.loads((run / "job.json").read_text())["jobs"][-1], "COMPLETED", "FAILED")
    said = [re.findall(r"'loss': '?[0-9.]+", (cluster / "runs" / name / "logs" / "rank0.log").read_text())
            for name in ("alone", "script")]  # fmt: skip
    assert said[0] == said[1]
    assert said[0], (run / "logs" / "rank0.log").read_text()


def test_zero2_trains_the_same_and_is_evaluated_by_a_dependent_job(cluster: Path, whole: Path) -> None:
    run, job = _submit(cluster, "zero2", "parallel.strategy=zero2", f"train.stop_after_steps={STEPS}")
    done = dist_train(["submit", str(run), "--checkpoint", "last", "--after", str(run)], cluster)
    assert done.returncode == 0, done.stderr
    evaluation = re.search(r"job +(\d+)", done.stdout)
    assert evaluation is not None
    _ended_well(run, job)
    here, there = losses(run), losses(whole)
    assert max(abs(here[step] - there[step]) / there[step] for step in range(1, 21)) < 1e-5
    _wait_for(evaluation[1], "COMPLETED", "FAILED")
    assert _field(evaluation[1], "JobState") == "COMPLETED", next(run.glob("logs/slurm-*.log")).read_text()


def test_an_allocation_is_used_by_run(cluster: Path) -> None:
    words = [*TICKET_SETTINGS, "train.steps=20", "eval.every_steps=20", "slurm.gpus=none", "name=allocated"]
    command = [
        sys.executable,
        "-m",
        "launcher",
        "run",
        "ticket_routing",
        *words,
        "--nodes",
        "2",
        "--gpus-per-node",
        "1",
    ]
    done = subprocess.run(
        ["salloc", "-N2", "--cpus-per-task=2", "--time=10", *command],
        cwd=cluster,
        env=environment(cluster, PYTHONPATH=str(SCRIPTS.parent.parent)),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "n1: ranks 0 to 0; n2: ranks 1 to 1" in done.stdout
    assert (cluster / "runs" / "allocated" / "report.html").is_file()


def test_a_node_that_dies_costs_at_most_one_checkpoint(cluster: Path, whole: Path) -> None:
    """Last, since it leaves the cluster with a node less."""
    run, job = _submit(cluster, "node-lost")
    wait_for_step(run, 60)
    config = Path(os.environ["SLURM_CONF"])
    os.kill(int((config.parent.parent / "run" / "slurmd.n2.pid").read_text()), signal.SIGKILL)
    for pid in _ranks(run).values():
        os.kill(pid, signal.SIGSTOP)  # so that there is something left to do when Slurm notices
    _ended_well(run, job)
    assert int(_field(job, "Restarts")) >= 1
    assert losses(run) == losses(whole)
    _assert_nothing_is_left(run)
