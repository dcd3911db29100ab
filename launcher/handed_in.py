"""What a run directory knows of its Slurm job, job.json, held against what Slurm says of it."""

from __future__ import annotations

import contextlib
import shlex
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from dist_train.events import read_lines
from dist_train.rundir import RunDir, read_json, write_json
from slurm import client

MEMBERS = "members.json"
"""In the folder of an array: its runs, in the order of the indices."""


def hand_in(directory: RunDir, accept: Sequence[str] = ()) -> str:
    """Submit the script of a run directory. Returns the job's id. accept: what may have changed, as in `resume`."""
    earlier = read_json(directory.job)["jobs"] if directory.job.is_file() else []
    record = {"submitted": round(time.time(), 3), "accept": list(accept), "script": str(directory.job_script)}
    # Whoever is killed in between leaves a run that says that it has a job, which `newest_job` then looks for.
    write_json(directory.job, {**record, "jobs": earlier, "is_under_way": True})
    with signals_held():
        job_id = client.submit(directory.job_script)
        write_json(directory.job, {**record, "jobs": [*earlier, job_id]})
    shown = shlex.quote(str(directory.path))
    print(f"job            {job_id}: {directory.job_script}")
    print(f"follow it      dist-train status {shown}, dist-train logs -f {shown}", flush=True)
    return job_id


def was_submitted(path: str) -> bool:
    run = RunDir(path)
    return run.job.is_file() or run.job_script.is_file()


def newest_job(run: RunDir) -> str | None:
    """Its id; None where there is none."""
    if not run.job.is_file() or not client.is_here():
        return None
    record = read_json(run.job)
    if record.get("is_under_way"):
        found = client.find(script_of_job(run))
        if found is not None:
            return found
    jobs: list[str] = record["jobs"]
    return jobs[-1] if jobs else None


def script_of_job(run: RunDir) -> Path:
    """What was handed in: its own, or that of the array that it is of."""
    return Path(read_json(run.job).get("script", run.job_script))


def state_of(run: RunDir) -> client.JobState | None:
    """Of its newest job; None where it has none. A cluster that was built anew gives the same number to others."""
    job = newest_job(run)
    return None if job is None else client.job_state(job, script_of_job(run))


def lives(run: RunDir) -> bool:
    """Whether its job waits or runs."""
    state = state_of(run)
    return state is not None and not state.has_ended


def is_done(run: RunDir) -> bool:
    """Whether it has its report, or its last start has ended well: a script has no report, nor has what was timed."""
    events = list(read_lines(run.events))
    last = [event["attempt"] for event in events if event["event"] == "run_started"][-1:]
    ended = [event["attempt"] for event in events if event["event"] == "finished"]
    return run.report_json.is_file() or (bool(last) and last[0] in ended)


def members_of(folder: Path) -> list[RunDir]:
    """The runs of an array by their indices."""
    return [RunDir(folder / name) for name in read_json(folder / MEMBERS)["runs"]]


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Ctrl-C counts when what is done here is done and written down."""
    heard: list[int] = []
    # Not a mask: it would hold for this thread, and another one takes the signal.
    before = {
        number: signal.signal(number, lambda number, _: heard.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if heard:
        raise KeyboardInterrupt
