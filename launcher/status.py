"""dist-train status, logs and cancel: the same for runs of this machine and for those of Slurm."""

from __future__ import annotations

import os
import signal
import statistics
import sys
import time
from pathlib import Path
from typing import IO, Any

from dist_train.errors import ConfigError, Preempted, error_for_code
from dist_train.events import read_lines
from dist_train.rundir import RunDir, read_json
from launcher.handed_in import MEMBERS, is_done, lives, members_of, newest_job, state_of
from launcher.summary import open_console
from slurm import client

_ENDS = ("attempt_failed", "failed", "finished")
_FOLLOW_S = 0.5
# The cluster's controller is asked so often.
_ASK_S = 5.0
# One line alone may be of a step that was cut short.
_RATE_LINES = 20


def print_status(path: str) -> None:
    """State, progress, rate, time left, restarts, newest checkpoint, and the cause of the end in words. Of an array's
    folder the state of each run."""
    if (Path(path) / MEMBERS).is_file():
        for member in members_of(Path(path)):
            print(f"{member.name}  {_state(member, _of_training(list(read_lines(member.events))))[1]}")
        return
    run = RunDir.any_kind(path)
    events = _of_training(list(read_lines(run.events)))
    goes_on, state = _state(run, events)
    lines = [("run", str(run.path)), ("state", state)]
    steps = read_json(run.plan).get("steps") if run.plan.is_file() else None
    trained = [line for line in read_lines(run.metrics) if line["split"] == "train"]
    if trained:
        last = trained[-1]
        lines.append(("step", f"{last['step']} of {steps}, loss {last.get('loss') or float('nan'):.4f}"))
        rate = statistics.median(line.get("samples_per_s") or 0.0 for line in trained[-_RATE_LINES:])
        if rate:
            batch = read_json(run.plan)["global_batch_size"]
            left = (steps - last["step"]) * batch / rate if goes_on else 0.0
            lines.append(("rate", f"{rate:,.0f} samples/s" + (f", {left / 60:.1f} minutes left" if left else "")))
    starts = [event for event in events if event["event"] == "run_started"]
    lines.append(("starts", f"{len(starts)}"))
    saved = [event for event in events if event["event"] == "checkpoint_committed"]
    if run.config.is_file():
        lines.append(("saved", f"step {saved[-1]['step']}, {_ago(saved[-1]['time'])}" if saved else "nothing yet"))
    cause = _cause(events)
    if cause:
        lines.append(("last end", cause))
    console = open_console()
    for name, text in lines:
        console.print(f"{name:10s} {text}", soft_wrap=True)


def print_logs(path: str, rank: int | None, follows: bool) -> None:
    """What the run has said: the job's or launcher's own output, or one rank's log."""
    if (Path(path) / MEMBERS).is_file():
        names = ", ".join(str(member.path) for member in members_of(Path(path)))
        raise ConfigError(f"{path} holds the runs of an array: name one of them, {names}.")
    run = RunDir.any_kind(path)
    file = run.rank_log(rank) if rank is not None else _output_of(run)
    while follows and not file.is_file() and _goes_on(run):
        time.sleep(_ASK_S)
    if not file.is_file():
        known = ", ".join(each.stem.removeprefix("rank") for each in sorted(run.logs.glob("rank*.log"))) or "none yet"
        waits = " yet: -f waits for it" if _goes_on(run) else ", and its job has ended: do its nodes see this folder?"
        raise ConfigError(f"there is no {file}{waits if run.job.is_file() else ''}; ranks with a log: {known}.")
    with open(file, encoding="utf-8", errors="replace") as stream:
        _copy(stream)
        asked = time.monotonic()
        while follows and (time.monotonic() - asked < _ASK_S or _goes_on(run)):
            if time.monotonic() - asked >= _ASK_S:
                asked = time.monotonic()
            time.sleep(_FOLLOW_S)
            _copy(stream)
        _copy(stream)


def _output_of(run: RunDir) -> Path:
    """Of the newest job, or of rank 0."""
    if not run.job.is_file():
        return run.rank_log(0)
    job = read_json(run.job)
    return Path(job["log"]) if "log" in job else run.logs / f"slurm-{newest_job(run) or 'NONE'}.log"


def _goes_on(run: RunDir) -> bool:
    """Whether it waits or runs. What Slurm does not answer now it may answer later."""
    try:
        return run.is_locked() or lives(run)
    except client.SlurmError:
        return True


def cancel(path: str) -> None:
    """End a run for good; what is saved stays, and `dist-train resume` goes on with it."""
    run = RunDir(path) if (Path(path) / MEMBERS).is_file() else RunDir.any_kind(path)
    state = state_of(run)
    if state is not None and not state.has_ended:
        client.cancel(state.id)
        print(f"job {state.id} is cancelled; it saves what it can in the time that the cluster leaves it.")
        return
    holder = run.holder()
    if not run.is_locked() or holder is None:
        raise ConfigError(f"{run.path} is not running: there is nothing to cancel.")
    pid, host = holder
    if host != os.uname().nodename:
        raise ConfigError(f"{run.path} runs on {host} (process {pid}): type it there.")
    os.kill(pid, signal.SIGTERM)
    print(f"process {pid} is told to stop: the step under way is ended and saved.")


def _of_training(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without what evaluations that were asked for later have said: the training is what it was."""
    later = {event["attempt"] for event in events if event["event"] == "evaluation_started"}
    return [event for event in events if event.get("attempt") not in later]


def _state(run: RunDir, events: list[dict[str, Any]]) -> tuple[bool, str]:
    """(whether it waits or runs, in words). Slurm, which may be slow to answer, is asked once."""
    try:
        state = state_of(run)
    except client.SlurmError as error:
        return False, f"{'done, as far as its folder says' if is_done(run) else 'not known'}: {error}"
    if state is not None and not state.has_ended:
        words = [f"job {state.id} is {state.state}"]
        words += [f"({state.reason})"] if state.reason else []
        words += [f"on {state.nodes}"] if state.nodes else []
        words += [f"requeued {state.restarts} times"] if state.restarts else []
        words += [f"{state.minutes_left:.0f} minutes to its time limit"] if state.minutes_left is not None else []
        return True, ", ".join(words).replace(", (", " (")
    if run.is_locked():
        return True, "running"
    if is_done(run):
        return False, "done"
    ends = [event for event in events if event["event"] in ("run_started", *_ENDS)]
    if not ends and state is None:
        return False, "not started"
    if not ends and state is not None:
        told = state.state if state.state != "UNKNOWN" else state.reason
        told += f", {state.reason}" if state.reason not in ("", told) else ""
        return False, f"job {state.id} ended before it started the ranks ({told}): dist-train logs {run.path}"
    if ends[-1]["event"] == "run_started":
        return False, f"interrupted, go on with: dist-train resume {run.path}"
    stopped = ends[-1].get("code") == Preempted.exit_code
    return False, f"{'stopped and saved' if stopped else 'failed'}, go on with: dist-train resume {run.path}"


def _cause(events: list[dict[str, Any]]) -> str | None:
    """Why the newest start ended badly; None where it has not."""
    last = max((int(event.get("attempt", 0)) for event in events), default=0)
    failed = [event for event in events if event["event"] in ("attempt_failed", "failed") and event["attempt"] == last]
    if not failed or any(event["event"] == "finished" and event["attempt"] == last for event in events):
        return None
    # What the launcher says explains the rest.
    told = next((event for event in failed if event["event"] == "attempt_failed"), failed[0])
    kind = error_for_code(told["code"])
    return f"start {last}: {kind.title} (exit code {told['code']}): {str(told['message']).splitlines()[0]}"


def _copy(stream: IO[str]) -> None:
    sys.stdout.write(stream.read())
    sys.stdout.flush()


def _ago(then: float) -> str:
    return f"{(time.time() - then) / 60:.1f} minutes ago"
