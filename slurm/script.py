"""One sbatch script as text: a pure function of what is asked for. Every value is quoted for who reads it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dist_train.config import SlurmConfig
from dist_train.errors import ConfigError

# What sbatch reads as it is in a #SBATCH line.
_PLAIN = re.compile(r"[A-Za-z0-9_.,:@%+=/*&|()\[\]-]*")

# All launchers of a job end within a minute of each other.
_STUCK_S = 180
# In front of the step, where what runs can stop early.
_STOPS_EARLY = """\
# Before the time limit Slurm tells this script alone, and this script one launcher, which runs on this node: to signal
# the step would reach every process in it.
pid_file={pid_file}"${{SLURM_ARRAY_TASK_ID:-}}"
rm -f "$pid_file"
tell_launcher() {{
    until kill -USR1 "$(cat "$pid_file" 2>/dev/null)" 2>/dev/null; do sleep 1; done
}}
trap 'tell_launcher &' USR1
"""
_BEFORE = """\
# TERM means that the job is cancelled or preempted: all have got it; what comes then is not for this script to decide.
ended=
trap 'ended=1' TERM
"""
_AFTER = """\
child=$!
# A signal ends the waiting, not the child.
while kill -0 "$child" 2>/dev/null; do
    wait "$child"
done
wait "$child"
code=$?
# 75: all is saved and there is more to do. 14: a node or rank was missing. Above 128: a launcher was killed.
if [ "$code" -eq 75 ] || [ "$code" -eq 14 ] || [ "$code" -gt 128 ]; then
    if [ "${{SLURM_RESTART_COUNT:-0}}" -ge {requeues} ]; then
        echo "not requeued: it was {requeues} times (slurm.requeues)"
        exit "$code"
    fi
    # In an array this task alone.
    job=${{SLURM_ARRAY_JOB_ID:+${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID}}
    job=${{job:-$SLURM_JOB_ID}}
    for _ in 1 2 3 4 5 6; do
        [ -z "$ended" ] || break
        echo "exit code $code: the job requeues itself"
        now=$(scontrol show job "$job" -o | sed -n 's/.* Restarts=\\([0-9]*\\) .*/\\1/p')
        if [ -n "$now" ] && [ "$now" != "${{SLURM_RESTART_COUNT:-0}}" ]; then
            echo "it has started again without this node"
            break
        fi
        scontrol requeue "$job" && sleep 300
        sleep 5
    done
fi
exit "$code"
"""


@dataclass(frozen=True)
class Job:
    """What one sbatch script is made of."""

    name: str
    nodes: int
    gpus_per_node: int
    """0 on a CPU cluster."""
    code: Path
    """Folder whose packages the job imports."""
    command: tuple[str, ...]
    """What each node runs, once."""
    pid_file: Path
    """Holds the process id of the launcher on the job's first node; in an array its index follows the name."""
    log: Path
    """Where the job's own output goes; %j and %A stand for its number, as in sbatch."""
    array: str | None = None
    """Indices of an array, for example 0-2; the command's last word is then followed by the index."""
    dependency: str | None = None
    """Beside slurm.dependency."""
    stops_early: bool = True
    """Whether what it runs saves and goes on after a signal."""


def render(job: Job, slurm: SlurmConfig) -> str:
    """The script. ConfigError for a path or name that cannot be written into it."""
    for text in (*job.command, str(job.code), str(job.log), str(job.pid_file), job.name):
        if not text.isprintable():
            raise ConfigError(f"{text!r} holds a character that cannot be printed: Slurm scripts are lines of text.")
    options = "".join(f"#SBATCH {name}{_value(value)}\n" for name, value in _options(job, slurm))
    variables = {**slurm.environment, "PYTHONSAFEPATH": "1"}
    lines = [
        # What trains in another environment than was asked for is worse than what does not train.
        *(f"module load {shlex.quote(module)} || exit 2" for module in slurm.modules),
        *slurm.setup,
        *(f"export {name}={shlex.quote(value)}" for name, value in variables.items()),
        f"export PYTHONPATH={shlex.quote(str(job.code))}${{PYTHONPATH:+:$PYTHONPATH}}",
    ]
    early = _STOPS_EARLY.format(pid_file=shlex.quote(str(job.pid_file))) if job.stops_early else ""
    before = "\n".join(lines) + f"\n\n{early}{_BEFORE}"
    return f"#!/bin/bash\n{options}\n{before}{_step(job, slurm)} &\n{_AFTER.format(requeues=slurm.requeues)}"


def _options(job: Job, slurm: SlurmConfig) -> list[tuple[str, str | None]]:
    """Options of sbatch with their values; those of slurm.extra replace what is here."""
    kind = f"{slurm.gpu_type}:" if slurm.gpu_type else ""
    gpus = {
        "gpus-per-node": ("--gpus-per-node", f"{kind}{job.gpus_per_node}"),
        "gres": ("--gres", f"gpu:{kind}{job.gpus_per_node}"),
    }
    asked = gpus.get(slurm.gpus) if job.gpus_per_node else None
    dependency = ",".join(filter(None, (slurm.dependency, job.dependency)))
    options: dict[str, str | None] = {
        "--job-name": job.name,
        "--nodes": str(job.nodes),
        "--ntasks-per-node": "1",
        "--output": str(job.log).replace("\\", "\\\\"),
        "--open-mode": "append",
        "--requeue": None,
    }
    found = {
        "--cpus-per-task": slurm.cpus_per_node,
        "--account": slurm.account,
        "--partition": slurm.partition,
        "--qos": slurm.qos,
        "--time": slurm.time,
        "--constraint": slurm.constraint,
        "--mem": slurm.memory,
        "--nodelist": slurm.nodelist,
        "--exclude": slurm.exclude,
        "--reservation": slurm.reservation,
        "--mail-user": slurm.mail_user,
        "--mail-type": "BEGIN,END,FAIL,REQUEUE" if slurm.mail_user else None,
        "--dependency": dependency or None,
        "--kill-on-invalid-dep": "yes" if dependency else None,
        "--array": job.array,
        "--signal": f"B:USR1@{slurm.stop_early_s}" if job.stops_early else None,
    }
    options |= {name: str(value) for name, value in found.items() if value is not None}
    if asked is not None:
        options[asked[0]] = asked[1]
    if slurm.exclusive:
        options["--exclusive"] = None
    for text in slurm.extra:
        name, equals, value = text.partition("=")
        options[name] = value if equals else None
    return list(options.items())


def _step(job: Job, slurm: SlurmConfig) -> str:
    """The command line that starts one launcher on each node."""
    words = step_words(job.nodes, slurm)
    command: Sequence[str] = job.command
    if slurm.container_image is not None:
        own = job.pid_file.parent
        if re.search("[:,]", str(own)):
            raise ConfigError(f"a container cannot mount {own}: its path has a colon or a comma. Set output_dir.")
        seen = [f"{own}:{own}", *slurm.container_mounts]
        if slurm.container == "pyxis":
            words += [f"--container-image={slurm.container_image}", f"--container-mounts={','.join(seen)}"]
        else:
            gpus = ["--nv"] if job.gpus_per_node else []
            command = ["apptainer", "exec", *gpus, "--bind", ",".join(seen), slurm.container_image, *command]
    index = ' "$SLURM_ARRAY_TASK_ID"' if job.array is not None else ""
    return shlex.join([*words, *command]) + index


def step_words(nodes: int, slurm: SlurmConfig) -> list[str]:
    """The srun that starts one task on each node."""
    words = ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1"]
    # A launcher that ended must not take the others with it: they save, and say why; one that is stuck is not awaited.
    words += ["--kill-on-bad-exit=0", f"--wait={_STUCK_S}"]
    if slurm.cpus_per_node is not None:
        words.append(f"--cpus-per-task={slurm.cpus_per_node}")  # srun does not take it from sbatch any more
    return words


def _value(value: str | None) -> str:
    if value is None:
        return ""
    if _PLAIN.fullmatch(value):
        return f"={value}"
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'="{escaped}"'
