"""What the cluster says and does: sbatch, squeue, scontrol, scancel, sinfo. Every call has a time limit."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from dist_train.errors import ConfigError, ToolkitError

_TIMEOUT_S = 60.0
_UNLIMITED = 10**9
_ENDED = (
    *("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL"),
    *("PREEMPTED", "UNKNOWN"),
)


@dataclass(frozen=True)
class Partition:
    name: str
    is_default: bool
    is_up: bool
    nodes: int
    """In working order."""
    gpus_per_node: int
    """Of the nodes that have most."""
    cpus_per_node: int
    most_minutes: int
    """The time limit."""


@dataclass(frozen=True)
class JobState:
    state: str
    """As Slurm calls it, for example PENDING or RUNNING; UNKNOWN when Slurm has forgotten the job."""
    reason: str
    nodes: str
    restarts: int
    minutes_left: float | None
    id: str = ""

    @property
    def has_ended(self) -> bool:
        """Whether it neither runs nor waits any more."""
        return self.state in _ENDED


class SlurmError(ToolkitError):
    """A command of Slurm failed."""

    title = "Slurm error"


class NoAnswerError(SlurmError):
    """A command of Slurm was given up on; what it was to do may be done."""


def is_here() -> bool:
    return shutil.which("sbatch") is not None


def submit(script: Path) -> str:
    """Returns the job's id."""
    return _call(["sbatch", "--parsable", str(script)]).strip().partition(";")[0]


def run_step(command: list[str], environment: dict[str, str]) -> int:
    """Run an srun to its end. Returns its exit code. Ctrl-C has what it started save and end; a second one kills."""
    # A session of its own: srun would take Ctrl-C for itself.
    step = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        return step.wait()
    except KeyboardInterrupt:
        print("stopping: the step under way is ended and saved; once more to end at once.", flush=True)
        _call(["scancel", "--signal=TERM", environment["SLURM_JOB_ID"]])
        try:
            return step.wait()
        except KeyboardInterrupt:
            step.kill()
            raise


def cancel(job_id: str) -> None:
    _call(["scancel", job_id])


def partitions() -> list[Partition]:
    """What the cluster has, from sinfo; one entry a partition."""
    found: dict[str, Partition] = {}
    for line in _call(["sinfo", "-h", "-e", "-o", "%R|%a|%D|%T|%G|%c|%l|%P"]).splitlines():
        name, up, nodes, state, gres, cpus, limit, starred = line.split("|")
        usable = int(nodes) if re.match(r"(idle|mixed|allocated|completing|planned|reserved)", state) else 0
        before = found.get(name)
        found[name] = Partition(
            name=name,
            is_default=starred.endswith("*"),
            is_up=up == "up",
            nodes=usable + (before.nodes if before else 0),
            gpus_per_node=max(_gpus(gres), before.gpus_per_node if before else 0),
            cpus_per_node=max(int(re.sub(r"\D", "", cpus) or 0), before.cpus_per_node if before else 0),
            most_minutes=minutes(limit),
        )
    return list(found.values())


def find(script: Path) -> str | None:
    """The id of the newest of this user's jobs that waits or runs with this script."""
    lines = [line.partition("|") for line in _call(["squeue", "-h", "--me", "-o", "%i|%o"]).splitlines()]
    found = [job_id for job_id, _, command in lines if command == str(script)]
    return max(found, key=lambda job_id: int(job_id.partition("_")[0]), default=None)


def most_in_an_array() -> int:
    """The largest index of an array, and one."""
    match = re.search(r"^MaxArraySize\s*=\s*(\d+)", _call(["scontrol", "show", "config"]), flags=re.MULTILINE)
    return int(match[1]) if match else _UNLIMITED


def job_state(job_id: str, script: Path) -> JobState:
    """Of a job, of one task of an array, or of an array, that was handed in as this script."""
    try:
        text = _call(["scontrol", "show", "job", job_id, "-o"])
    except NoAnswerError:
        raise
    except SlurmError as error:
        if "Invalid job id" in str(error) or "not found" in str(error):
            return JobState("UNKNOWN", "Slurm has forgotten it", "", 0, None, job_id)
        raise
    command = re.search(r" Command=(.*?) WorkDir=", text)
    if command is None or command[1] != str(script):
        return JobState("UNKNOWN", "Slurm has given its number to another job", "", 0, None, job_id)
    every = [dict(re.findall(r"(\w+)=(\S*)", line)) for line in text.splitlines() if line]
    # Of an array the first task that has not ended.
    fields = next((each for each in every if each.get("JobState") not in _ENDED), every[0])
    limit, run = minutes(fields.get("TimeLimit", "")), minutes(fields.get("RunTime", ""))
    running = fields.get("JobState") == "RUNNING" and limit < _UNLIMITED
    reason = fields.get("Reason", "")
    return JobState(
        state=fields.get("JobState", "UNKNOWN"),
        reason="" if reason == "None" else reason,
        nodes="" if fields.get("NodeList") in (None, "(null)") else fields["NodeList"],
        restarts=int(fields.get("Restarts", "0")),
        minutes_left=float(limit - run) if running else None,
        id=job_id,
    )


def host_names(nodelist: str) -> list[str]:
    """The nodes of a list as Slurm writes it, in its order."""
    return _call(["scontrol", "show", "hostnames", nodelist]).split()


def minutes(text: str) -> int:
    """A time as Slurm writes it: MM, MM:SS, HH:MM:SS, D-HH:MM:SS; UNLIMITED is very long."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text.strip())
    if match is None:
        return _UNLIMITED
    days, *rest = (int(part) if part else None for part in match.groups())
    first, second, third = rest
    if days is not None or third is not None:
        return (days or 0) * 1440 + (first or 0) * 60 + (second or 0)
    return first or 0


def _gpus(gres: str) -> int:
    """gpu:2, gpu:a100:8(S:0-1), (null)"""
    counts = re.findall(r"gpu(?::[^:,()]+)?:(\d+)(?=[(,]|$)", gres)
    return sum(map(int, counts))


def _call(command: list[str]) -> str:
    """What a command of Slurm prints. SlurmError with its own words."""
    try:
        # A session of its own: Ctrl-C is for us to hear, not for a command that may be half done.
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, start_new_session=True)
    except FileNotFoundError as error:
        raise ConfigError(f"{command[0]} cannot be found: this machine has no Slurm; use `dist-train run`.") from error
    except subprocess.TimeoutExpired as error:
        raise NoAnswerError(
            f"{command[0]} did not answer within {_TIMEOUT_S:.0f} s: is the cluster's controller up?"
        ) from error
    if done.returncode != 0:
        words = done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}"
        raise SlurmError(f"{' '.join(command[:2])} failed: {words}")
    return done.stdout
