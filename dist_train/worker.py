"""What each rank runs: python -m dist_train.worker RUN_DIR, or RECIPE [key=value ...] under any launcher."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dist_train.errors import CrashError, Preempted, StorageError, ToolkitError, error_for_code
from dist_train.events import current_attempt, log_event, read_lines
from dist_train.hardware import machine_id
from dist_train.heartbeat import Heartbeat, waited_in_vain
from dist_train.rank_environment import settle_environment, settle_rank_variables
from dist_train.rank_process import die_with_launcher, own_run, redirect_output
from dist_train.rundir import LAUNCHER_PID, RunDir
from dist_train.stop import StopFlag

if TYPE_CHECKING:  # imported when a rank has said that it lives: torch takes seconds
    from dist_train.config import RunConfig
    from dist_train.plan import LaunchPlan
    from dist_train.recipe import Recipe
    from dist_train.score import Score
    from dist_train.task import Task


def main(arguments: list[str]) -> int:
    """Run this rank to its end. Returns the exit code; the cause of a failure is in events.jsonl."""
    settle_rank_variables()
    if arguments and LAUNCHER_PID in os.environ and RunDir(arguments[0]).config.is_file():
        return run_attempt(arguments[0], arguments[1:])
    from dist_train.direct_start import RefusedError, joined_run

    terminal = os.dup(2)

    def say(error: ToolkitError) -> None:
        os.write(terminal, f"\n{error.title}: {error}\n".encode())

    try:
        with joined_run(arguments, say) as (run, options):
            code = run_attempt(str(run.path), options)
            if code != 0 or os.environ.get("RANK", "0") == "0":
                os.write(terminal, _last_words(run, code).encode())
            return code
    except RefusedError as error:
        return error.exit_code
    except ToolkitError as error:
        say(error)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


def run_attempt(path: str, arguments: list[str]) -> int:
    """Train in the run that is there, as the rank that the environment names."""
    run, attempt = own_run(path)
    rank = int(os.environ.get("RANK", "0"))
    # Before the launcher knows our pid: a signal during the seconds of imports waits for the first step.
    stop = StopFlag()
    stop.install()
    die_with_launcher()
    redirect_output(run.rank_log(rank))
    heartbeat = Heartbeat(run, rank)
    host = {"host": os.uname().nodename, "machine": machine_id()}
    log_event(run.events, "rank_started", attempt=attempt, rank=rank, pid=os.getpid(), **host)
    try:
        run_rank(run, attempt, stop, heartbeat, tuple(arguments))
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
    """Config, task, engine, resume, train, finish: in this order, on every rank."""
    from dist_train.config_io import load_run_config
    from dist_train.hub import settle_offline
    from dist_train.plan import LaunchPlan
    from dist_train.recipe import load_recipe
    from dist_train.stage import staged_folder

    config = load_run_config(run)
    settle_offline(config.data)
    recipe = load_recipe(config.recipe)
    plan = LaunchPlan.from_json(json.loads(run.plan.read_text()))
    settle_environment(plan.device, plan.strategy, plan.deterministic)
    facts = json.loads(run.data_facts.read_text())
    stage_to = getattr(config.data, "stage_to", None)
    folder = Path(facts["folder"]) if stage_to is None else staged_folder(run, attempt, facts, stage_to)
    task = recipe.make_task(config, folder)
    rank = Attempt(run, attempt, config, plan, stop, heartbeat)
    train_task(rank, task, recipe.score, recipe.source_files(), arguments, recipe)


@dataclass(frozen=True)
class Attempt:
    """What this rank knows of the run before it builds anything."""

    run: RunDir
    number: int
    config: RunConfig
    plan: LaunchPlan
    stop: StopFlag
    heartbeat: Heartbeat


def train_task(
    attempt: Attempt,
    task: Task,
    score: Score,
    code: list[Path],
    arguments: tuple[str, ...] = (),
    recipe: Recipe | None = None,
) -> None:
    """Engine, resume, train, finish.

    code: the files that define the task. arguments: --accept=code goes on with changed code; --evaluate=CHECKPOINT
    trains nothing; --parity records each step and ends there; --bandwidth measures the collectives and trains nothing;
    --speed trains and evaluates nothing.
    recipe: where the memory of a step is to be held against its prediction.
    """
    from dist_train.bandwidth import write_bandwidth
    from dist_train.config_io import result_fingerprint
    from dist_train.finish import finish
    from dist_train.loop import train
    from dist_train.memory_record import write_memory_record
    from dist_train.parity import record
    from dist_train.recipe import code_fingerprint
    from dist_train.resume import build_training, restore

    accepted = {word.removeprefix("--accept=") for word in arguments if word.startswith("--accept=")}
    evaluate = next((word.removeprefix("--evaluate=") for word in arguments if word.startswith("--evaluate=")), None)
    run, config = attempt.run, attempt.config
    fingerprints = {
        "code": code_fingerprint(code),
        "data": json.loads(run.data_facts.read_text())["fingerprint"],
        "config": result_fingerprint(config),
    }
    training = build_training(
        run, config, attempt.plan, task, attempt.number, score, fingerprints, attempt.stop, attempt.heartbeat
    )
    try:
        if "--bandwidth" in arguments:
            write_bandwidth(training)
            return
        restore(training, accepted)
        if "--parity" in arguments:
            record(training)
            return
        if evaluate is None:
            train(training)
            if recipe is not None:
                write_memory_record(training, recipe)
        if "--speed" in arguments:
            return
        finish(training, evaluate or "best")
    except BaseException as error:
        if training.tracker is not None:
            training.tracker.close(failed=not isinstance(error, Preempted))
        raise


def _report(run: RunDir, attempt: int, rank: int, error: ToolkitError) -> int:
    with contextlib.suppress(OSError, StorageError):  # on a full disk the launcher finds the cause without our word
        print(f"{error.title}: {error}", file=sys.stderr, flush=True)
        log_event(run.events, "failed", attempt=attempt, rank=rank, code=error.exit_code, message=str(error))
    return error.exit_code


def _last_words(run: RunDir, code: int) -> str:
    """What a rank that no launcher of ours watches says at its end."""
    if code == 0:
        with contextlib.suppress(StorageError):
            log_event(run.events, "finished", attempt=current_attempt(run.events))
        return f"\ndone: {run.report_html}\n"
    attempt = current_attempt(run.events)
    failures = [line for line in read_lines(run.events) if line["event"] == "failed" and line["attempt"] == attempt]
    if not failures or failures[0]["rank"] != int(os.environ.get("RANK", "0")):
        return ""  # the rank that failed first has said it
    again = f"\nGo on with: -m dist_train.worker {run.path}" if code == CrashError.exit_code else ""
    return f"\n{error_for_code(code).title}: {failures[0]['message']}{again}\n"


if __name__ == "__main__":
    code = main(sys.argv[1:])
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    # All is written and closed. The libraries' threads are not ended in order by the interpreter: one rank in some
    # hundred would abort here, after its work, and take the others with it.
    os._exit(code)
