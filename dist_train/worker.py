"""What each rank runs: python -m dist_train.worker RUN_DIR."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import json
import os
import signal
import sys
import traceback
from pathlib import Path

from dist_train.errors import CrashError, Preempted, StorageError, ToolkitError
from dist_train.events import current_attempt, log_event
from dist_train.heartbeat import Heartbeat, waited_in_vain
from dist_train.rundir import LAUNCHER_PID, RunDir
from dist_train.stop import StopFlag

_PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> int:
    """Run this rank to its end. Returns the exit code; the cause of a failure is in events.jsonl."""
    run = RunDir.existing(arguments[0])
    rank = int(os.environ.get("RANK", "0"))
    # Before the launcher knows our pid: a signal during the seconds of imports waits for the first step.
    stop = StopFlag()
    stop.install()
    _die_with_launcher()
    _redirect_output(run.rank_log(rank))
    heartbeat = Heartbeat(run, rank)
    attempt = current_attempt(run.events)
    log_event(run.events, "rank_started", attempt=attempt, rank=rank, pid=os.getpid(), host=os.uname().nodename)
    try:
        run_rank(run, attempt, stop, heartbeat, tuple(arguments[1:]))
    except ToolkitError as error:
        return _report(run, attempt, rank, error)
    except BaseException as error:
        traceback.print_exc()
        if "timed out" in str(error).lower() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            return _report(run, attempt, rank, waited_in_vain(run, rank, [rank]))
        crash = CrashError(f"rank {rank}: {type(error).__name__}: {error}\nThe traceback is in {run.rank_log(rank)}.")
        return _report(run, attempt, rank, crash)
    log_event(run.events, "rank_finished", attempt=attempt, rank=rank)
    return 0


def run_rank(run: RunDir, attempt: int, stop: StopFlag, heartbeat: Heartbeat, arguments: tuple[str, ...] = ()) -> None:
    """Config, task, engine, resume, train, finish: in this order, on every rank.

    arguments: --accept=code goes on with changed code; --evaluate=CHECKPOINT trains nothing.
    """
    from dist_train.config_io import load_run_config, result_fingerprint
    from dist_train.finish import finish
    from dist_train.loop import train
    from dist_train.plan import LaunchPlan
    from dist_train.recipe import load_recipe
    from dist_train.resume import build_training, code_fingerprint, restore

    accepted = {word.removeprefix("--accept=") for word in arguments if word.startswith("--accept=")}
    evaluate = next((word.removeprefix("--evaluate=") for word in arguments if word.startswith("--evaluate=")), None)
    config = load_run_config(run)
    recipe = load_recipe(config.recipe)
    plan = LaunchPlan.from_json(json.loads(run.plan.read_text()))
    facts = json.loads(run.data_facts.read_text())
    fingerprints = {
        "code": code_fingerprint(recipe.config),
        "data": facts["fingerprint"],
        "config": result_fingerprint(config),
    }
    task = recipe.task.make_task(config, Path(facts["folder"]))
    training = build_training(run, config, plan, task, attempt, fingerprints, stop, heartbeat)
    try:
        restore(training, accepted)
        if evaluate is None:
            train(training)
        finish(training, recipe, evaluate or "best")
    except BaseException as error:
        if training.tracker is not None:
            training.tracker.close(failed=not isinstance(error, Preempted))
        raise


def _report(run: RunDir, attempt: int, rank: int, error: ToolkitError) -> int:
    with contextlib.suppress(OSError, StorageError):  # on a full disk the launcher finds the cause without our word
        print(f"{error.title}: {error}", file=sys.stderr, flush=True)
        log_event(run.events, "failed", attempt=attempt, rank=rank, code=error.exit_code, message=str(error))
    return error.exit_code


def _redirect_output(path: Path) -> None:
    """Everything this rank prints, native code included, goes to its own log."""
    path.parent.mkdir(exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    faulthandler.enable()


def _die_with_launcher() -> None:
    """Have the kernel kill this rank when its parent dies, so that no killed launcher leaves training behind."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    launcher = os.environ.get(LAUNCHER_PID)
    if launcher is not None and not Path(f"/proc/{launcher}").exists():
        os._exit(CrashError.exit_code)  # it died before we could ask for that


if __name__ == "__main__":
    code = main(sys.argv[1:])
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    # All is written and closed. The libraries' threads are not ended in order by the interpreter: one rank in some
    # hundred would abort here, after its work, and take the others with it.
    os._exit(code)
