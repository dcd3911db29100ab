"""Jobs of the local cluster: submit a training that lasts long enough to act on it, and look at what it did."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import psutil

from tests.front_door import TICKET_SETTINGS, dist_train, lines

SCRIPTS = Path(__file__).parent / "cluster"
# Long enough that a test can act while they run.
STEPS = 400
ON_CPUS = ["slurm.gpus=none", "slurm.time=20", "slurm.cpus_per_node=2"]
LONG = [
    *(word for word in TICKET_SETTINGS if not word.startswith(("train.steps", "eval.every_steps"))),
    f"train.steps={STEPS}",
    f"eval.every_steps={STEPS}",
    "eval.bootstrap_samples=100",
]


def missing_for_a_cluster() -> str | None:
    programs = ("slurmctld", "slurmd", "sbatch", "munged", "unshare")
    absent = [name for name in programs if shutil.which(name) is None]
    if absent:
        return f"{', '.join(absent)} not installed: apt-get install slurmctld slurmd slurm-client munge"
    rights = "mount --bind /etc/hosts /etc/hosts && hostname n1 && mknod $(mktemp -u) c 1 3"
    if os.geteuid() != 0 or subprocess.run(["unshare", "-mu", "sh", "-c", rights], capture_output=True).returncode:
        return "a local cluster needs root, namespaces of its own and device files"
    return None


def slurm(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def submit(desk: Path, name: str, *words: str, per_node: int = 1, **variables: str) -> tuple[Path, str]:
    """Submit the long training on two nodes. Returns its run directory and job."""
    arguments = ["submit", "ticket_routing", *LONG, *ON_CPUS, f"name={name}", *words]
    done = dist_train([*arguments, "--nodes", "2", "--gpus-per-node", str(per_node)], desk, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    run = desk / "runs" / name
    return run, json.loads((run / "job.json").read_text())["jobs"][-1]


def field(job: str, name: str) -> str:
    found = re.search(rf"\b{name}=(\S*)", slurm("scontrol", "show", "job", job, "-o"))
    assert found is not None
    return found[1]


def wait_for_state(job: str, *states: str, timeout_s: float = 150) -> None:
    deadline = time.monotonic() + timeout_s
    while field(job, "JobState") not in states:
        assert time.monotonic() < deadline, slurm("scontrol", "show", "job", job, "-o")
        time.sleep(0.2)


def ended_well(run: Path, job: str) -> None:
    wait_for_state(job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
    said = next(run.glob("logs/slurm-*.log")).read_text()
    assert field(job, "JobState") == "COMPLETED", said
    assert (run / "report.html").is_file(), said


def processes(run: Path) -> list[psutil.Process]:
    """All that belong to the run, of any node."""
    own = psutil.Process()
    others = [process for process in psutil.process_iter(["cmdline"]) if process != own]
    return [process for process in others if str(run) in " ".join(process.info["cmdline"] or [])]


def assert_nothing_is_left(run: Path) -> None:
    deadline = time.monotonic() + 30
    while processes(run):
        assert time.monotonic() < deadline, [process.cmdline() for process in processes(run)]
        time.sleep(0.2)


def ranks(run: Path) -> dict[int, int]:
    """Process of each rank of the newest attempt, of both nodes."""
    records = [*lines(run / "events.jsonl"), *lines(run / "logs" / "events-node1.jsonl")]
    started = [record for record in records if record["event"] == "rank_started"]
    newest = max(record["attempt"] for record in started)
    return {record["rank"]: record["pid"] for record in started if record["attempt"] == newest}


def head(run: Path) -> int:
    return int((run / ".head.pid").read_text())
