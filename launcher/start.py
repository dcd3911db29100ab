"""The commands that train: run and resume. dist_train/start_run.py makes the run, here its ranks are started."""

from __future__ import annotations

import bdb
import contextlib
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from dist_train import config_io
from dist_train.contradictions import refuse
from dist_train.deepspeed_base import shown_path
from dist_train.errors import (
    ConfigError,
    CrashError,
    HangError,
    NodeLostError,
    StoppedError,
    StorageError,
    ToolkitError,
)
from dist_train.events import log_event, read_lines
from dist_train.hardware import detect_hardware
from dist_train.heartbeat import Heartbeat
from dist_train.plan import LaunchPlan
from dist_train.rundir import ATTEMPT, RunDir, read_json, write_atomic
from dist_train.start_run import (
    Start,
    check_deepspeed_base,
    deepspeed_json,
    known_run,
    new_run,
    planned_run,
    print_plan,
    write_attempt,
)
from dist_train.stop import StopFlag
from launcher import accelerate_base
from launcher.accelerate_config import Rendezvous, accelerate_config, launch_command, worker_environment
from launcher.measure import measure_profile
from launcher.nodes import Notices, Place, Team, follow, lead, leading
from launcher.preflight import check_can_start, check_deepspeed_build, check_gpus, check_imports, check_one_rank
from launcher.process import Supervisor, read_output
from launcher.watch import Watch

LET_GO_S = 120.0
"""How long a job waits for its run directory, where an earlier start may still be ending."""


def run(recipe_name: str, overrides: list[str], debug: bool = False, place: Place | None = None) -> RunDir:
    """Train from a recipe file to the report, in a new run directory. place: this machine's, which is node 0."""
    check_imports()
    with leading(place, [recipe_name, *overrides]) as team:
        start = new_run(
            recipe_name, overrides, lambda start: _check_start(start, debug, team), git_state(), measure=measure_profile
        )
        with start.directory.locked():
            _attempt(start, debug, team=team)
    return start.directory


def train_in_job(directory: RunDir, place: Place | None, notices: Notices | None) -> None:
    """Begin or go on with a run that was submitted. Ranks that crash or hang are started again, at most slurm.restarts
    times without a new checkpoint."""
    stop = StopFlag()
    job = read_json(directory.job) if directory.job.is_file() else {}
    accept = job.get("accept", [])
    planned = read_json(directory.planned) if directory.planned.is_file() else {}
    arguments = (*(f"--accept={word}" for word in accept), *planned.get("arguments", []))
    # What trained in it before the job came back may still be ending on another node.
    with leading(place, [str(directory.path)], notices) as team, stop.installed(), directory.locked(LET_GO_S):
        start = known_run(directory, [], accept, lambda start: _check_planned(start, team), measure=measure_profile)
        left, begun = start.config.slurm.restarts, _last_step(directory)
        while True:
            if stop:
                raise StoppedError("asked to stop before the ranks were started; the newest checkpoint is kept.")
            before = _last_step(directory)
            try:
                return _attempt(start, False, arguments, team, stop)
            except NodeLostError:
                raise  # the job starts again, on nodes that live
            except (CrashError, HangError) as error:
                step = _last_step(directory)
                left = start.config.slurm.restarts if step > before else left
                if stop:
                    raise StoppedError(f"asked to stop, but this came before all was saved: {error}") from error
                if left == 0 and step == begun and isinstance(error, HangError):
                    raise CrashError(f"{error}\nNo step was saved in this job: it does not come back.") from error
                if left == 0:
                    raise
                left -= 1
                print(f"\n{error.title}: {error}\nstarting the ranks again, from step {step}", flush=True)
                log_event(directory.events, "restarting", step=step, message=str(error))


def _check_planned(start: Start, team: Team | None) -> None:
    """Beside what is checked anywhere: this node is what the submitted plan was made for."""
    if start.directory.planned.is_file():
        planned, plan = read_json(start.directory.planned), start.plan
        wanted = (planned["device"] or plan.device, planned["world_size"])
        if (plan.device, plan.world_size) != wanted:
            raise ConfigError(
                f"the run was planned for {wanted[1]} x {wanted[0]} when it was submitted, but on "
                f"{os.uname().nodename} it would be {plan.world_size} x {plan.device}: look at the node's GPUs and "
                "driver, at slurm.gpus, and at what slurm.extra asks for."
            )
    _check_start(start, False, team)


def _last_step(directory: RunDir) -> int:
    lines = read_lines(directory.events)
    return max((int(line["step"]) for line in lines if line["event"] == "checkpoint_committed"), default=0)


def join(place: Place, typed: list[str]) -> None:
    """Train what node 0 says, as another node of the launch."""
    check_imports()
    follow(place, ranks_of_node, typed)


def resume(
    path: str, overrides: list[str], accept: list[str], debug: bool = False, place: Place | None = None
) -> RunDir:
    """Go on from the newest checkpoint that verifies, with the same result as if nothing had happened. place: this
    machine's, which is node 0."""
    directory = RunDir.existing(path)
    print(f"resume         these may change: {', '.join(config_io.RESUMABLE)}")
    with leading(place, [path, *overrides]) as team, directory.locked():
        start = known_run(
            directory, overrides, accept, lambda start: _check_start(start, debug, team), measure=measure_profile
        )
        _attempt(start, debug, tuple(f"--accept={word}" for word in accept), team)
    return directory


def run_for_a_check(recipe_name: str, overrides: list[str], argument: str) -> RunDir:
    """A run whose ranks do what `argument` says and no more (see worker.run_rank)."""
    start = new_run(
        recipe_name, overrides, lambda start: _check_start(start, False), git_state(), measure=measure_profile
    )
    with start.directory.locked():
        _attempt(start, False, (argument,))
    return start.directory


def evaluate(path: str, checkpoint: str) -> tuple[RunDir, RunDir]:
    """Evaluate a checkpoint again, on the ranks of the run's config. Returns the run, and where the results lie."""
    directory = RunDir.existing(path)
    if checkpoint not in ("best", "last") and not checkpoint.isdigit():
        raise ConfigError(f"--checkpoint is {checkpoint}, but must be best, last or a step.")
    with directory.locked():
        start = planned_run(directory)
        _check_start(start, debug=False)
        # Newer code may evaluate an older run; it only may not go on training it without a word.
        _attempt(start, False, (f"--evaluate={checkpoint}", "--accept=code"))
    reported = [record["folder"] for record in read_lines(directory.events) if record["event"] == "reported"]
    return directory, RunDir(reported[-1])


def _check_start(start: Start, debug: bool, team: Team | None = None) -> None:
    plan = start.plan
    check_imports(plan.strategy)
    check_gpus(plan, start.hardware)
    check_can_start(plan, 1 if team is None else team.place.nodes)
    check_deepspeed_build(plan.strategy, plan.device)
    if debug:
        check_one_rank(plan)
    check_deepspeed_base(start)
    check_accelerate_base(start)


def check_accelerate_base(start: Start) -> None:
    """ConfigError for what contradicts the recipe in the user's own Accelerate YAML."""
    _accelerate_config(start)


def _accelerate_config(start: Start) -> dict[str, Any]:
    """The Accelerate config of the run, on top of the user's own. ConfigError for what contradicts the recipe in it."""
    ours = accelerate_config(start.plan, start.directory.deepspeed_config)
    path = start.config.parallel.accelerate_config
    if path is None:
        return ours
    shown = shown_path(path)
    base = accelerate_base.read_accelerate_base(path, shown)
    refuse(accelerate_base.check(base, shown, ours, deepspeed_json(start), start.settings))
    return accelerate_base.on_top(base, ours)


def _attempt(
    start: Start,
    debug: bool,
    arguments: tuple[str, ...] = (),
    team: Team | None = None,
    stop: StopFlag | None = None,
) -> None:
    """Start the ranks once and wait for them. stop: heard before they run, and set if they were told to stop."""
    directory, plan = start.directory, start.plan
    write_atomic(directory.accelerate_config, yaml.safe_dump(_accelerate_config(start)))
    started = "evaluation_started" if any(word.startswith("--evaluate=") for word in arguments) else "run_started"
    command = launch_command(plan, directory, arguments)
    attempt = write_attempt(start, started, command_lines(command))
    print_plan(directory, plan)
    rendezvous = None if team is None else team.begin(directory, attempt, arguments)
    command = launch_command(plan, directory, arguments, rendezvous=rendezvous)
    environment = worker_environment(plan, start.hardware, rendezvous) | {ATTEMPT: str(attempt)}
    if debug:
        from dist_train.worker import run_rank

        # In this very process, so that breakpoints work.
        os.environ["CUDA_VISIBLE_DEVICES"] = environment["CUDA_VISIBLE_DEVICES"]
        stop = StopFlag()
        stop.install()
        try:
            run_rank(directory, attempt, stop, Heartbeat(directory, 0), arguments)
        except bdb.BdbQuit:
            raise KeyboardInterrupt from None
        log_event(directory.events, "finished", attempt=attempt)
        return
    last_step = min(plan.steps, start.config.train.stop_after_steps or plan.steps)
    if stop:
        raise StoppedError("asked to stop before the ranks were started; the newest checkpoint is kept.")
    watch, supervisor = Watch(directory, plan, last_step), Supervisor(directory, attempt)
    try:
        lead(supervisor, command, environment, watch, team)
    except ToolkitError as error:
        tell_end(directory, attempt, error)
        raise
    finally:
        watch.close()
        if stop is not None and supervisor.asked_to_stop:
            stop.signal_name = "a signal to the launcher"
    log_event(directory.events, "finished", attempt=attempt)


def tell_end(directory: RunDir, attempt: int, error: ToolkitError) -> None:
    """Keep why an attempt ended: ranks that were killed, and those of other nodes, have said nothing here."""
    with contextlib.suppress(StorageError):
        log_event(directory.events, "attempt_failed", attempt=attempt, code=error.exit_code, message=str(error))


def ranks_of_node(
    run: RunDir, attempt: int, arguments: Sequence[str], rendezvous: Rendezvous, look: Callable[[], None]
) -> None:
    """Start this machine's ranks of a run that node 0 leads, and wait for them."""
    plan = LaunchPlan.from_json(read_json(run.plan))
    check_imports(plan.strategy)
    check_deepspeed_build(plan.strategy, plan.device)
    command = launch_command(plan, run, arguments, rendezvous=rendezvous)
    environment = worker_environment(plan, detect_hardware(), rendezvous) | {ATTEMPT: str(attempt)}
    Supervisor(run, attempt).run_to_end(command, environment, look)


def command_lines(command: list[str]) -> str:
    """What commands.sh keeps of an attempt."""
    typed = shlex.join(["dist-train", *sys.argv[1:]])
    text = f"# attempt {{attempt}}, typed in {os.getcwd()}\n# {typed}\n# which started the ranks with\n"
    return f"{text}# {shlex.join(command)}\n"


def git_state() -> dict[str, Any] | None:
    """Commit of the checkout that the run was typed in, else of the one that this toolkit runs from; null without."""
    for folder in (Path.cwd(), Path(__file__).resolve().parent):
        commit = read_output(["git", "-C", str(folder), "rev-parse", "HEAD"])
        if commit is not None:
            changes = read_output(["git", "-C", str(folder), "status", "--porcelain", "-uno"])
            return {"commit": commit, "dirty": bool(changes), "folder": str(folder)}
    return None
