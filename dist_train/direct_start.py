"""The door for ranks that somebody else has started: accelerate launch ... -m dist_train.worker RECIPE [key=value ...]

Rank 0 makes the run, the others wait for it and join. They meet in the launcher's own TCP store, which the process
group uses too, before there is a process group: what rank 0 refuses, it refuses before anything else starts.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from dist_train.config import RunConfig
from dist_train.errors import ConfigError, HangError, ToolkitError
from dist_train.launcher_settings import check_launcher, number_of_ranks, take_over
from dist_train.rundir import RunDir
from dist_train.start_run import Start, known_run, new_run, print_plan, read_commit, write_attempt

USAGE = """usage: accelerate launch [its own flags] -m dist_train.worker RECIPE [key=value ...]
       accelerate launch [its own flags] -m dist_train.worker RUN_DIR [key=value ...] [--accept=code|data|config]

The first trains a recipe in a new run directory, the second goes on with a run. torchrun and mpirun work alike."""

_ANSWER, _BEAT, _HEARD = "dist_train/run", "dist_train/beat", "dist_train/heard"
_BEAT_S = 2.0
# Rank 0 reads and prepares data, which may take long; silent it is never.
_SILENT_S = 60.0
# For the new directory to become visible on another node's file system.
_VISIBLE_S = 60.0


Say = Callable[[ToolkitError], None]


class RefusedError(ToolkitError):
    """Rank 0 has refused, and has said why."""


@contextlib.contextmanager
def joined_run(arguments: list[str], say: Say) -> Iterator[tuple[RunDir, list[str]]]:
    """The run that all ranks train, and the worker's arguments. Rank 0 holds the directory meanwhile.

    What rank 0 refuses it says before the others hear of it: a launcher ends all ranks when the first one ends.
    RefusedError then on every rank, another ToolkitError where a rank could not even ask.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        raise ConfigError(USAGE)
    options = [word for word in arguments[1:] if word.startswith("--accept=")]
    overrides = [word for word in arguments[1:] if word not in options]
    with joined(lambda held: _make_run(arguments[0], overrides, options, held), say) as run:
        yield run, options


@contextlib.contextmanager
def joined(make: Callable[[contextlib.ExitStack], Start], say: Say) -> Iterator[RunDir]:
    """The run that rank 0 makes and all ranks join; see `joined_run`. make: gets the stack that holds the directory."""
    _use_cpu_if_told()
    rank, store = int(os.environ.get("RANK", "0")), _open_store()
    if rank > 0:
        yield _wait_for_run(store, rank)
        return
    with contextlib.ExitStack() as held:
        try:
            with _beating(store):
                start = make(held)
        except ToolkitError as error:
            say(error)
            _publish(store, {"code": error.exit_code})
            raise _refused(error.exit_code) from error
        except BaseException:
            _publish(store, {"code": 1})
            raise
        _publish(store, {"path": str(start.directory.path)})
        yield start.directory


def _make_run(target: str, overrides: list[str], options: list[str], held: contextlib.ExitStack) -> Start:
    world_size = number_of_ranks()
    accept = [word.removeprefix("--accept=") for word in options]
    if (Path(target) / "config.yaml").is_file():
        directory = RunDir(target)
        held.enter_context(directory.locked())
        start = known_run(directory, overrides, accept, check_launcher, world_size, take_over, _measure)
    else:
        start = new_run(target, overrides, check_launcher, read_commit(), world_size, take_over, _measure)
        held.enter_context(start.directory.locked())
    typed = shlex.join(["-m", "dist_train.worker", target, *overrides, *options])
    lines = f"# attempt {{attempt}}, started in {os.getcwd()} by another launcher\n# {_parent_command()}\n# {typed}\n"
    write_attempt(start, "run_started", lines)
    print_plan(start.directory, start.plan)
    print(f"logs           {start.directory.logs}; progress: tail -f {start.directory.metrics}", flush=True)
    return start


def _open_store() -> Any:
    """The store of the launcher, or one that rank 0 opens and the process group shares; None for one rank."""
    if number_of_ranks() == 1:
        _note_a_lost_launch()
        return None
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is {number_of_ranks()}, but {', '.join(missing)} is not set: start the ranks with "
            "accelerate launch, torchrun or mpirun (with -x MASTER_ADDR -x MASTER_PORT)."
        )
    from torch.distributed import rendezvous

    store, _, _ = next(iter(rendezvous("env://", timeout=timedelta(seconds=_SILENT_S))))
    return store


def _wait_for_run(store: Any, rank: int) -> RunDir:
    heard, beat = time.monotonic(), 0
    while True:
        try:
            store.wait([_ANSWER], timedelta(seconds=_BEAT_S))
            break
        except RuntimeError as error:  # the store's own errors are of this kind
            try:
                now = store.add(_BEAT, 0)
            except RuntimeError:
                raise RefusedError("rank 0 ended before it made the run") from error
            if now != beat:
                beat, heard = now, time.monotonic()
            if time.monotonic() - heard > _SILENT_S:
                raise HangError(
                    f"rank {rank} waited in vain for rank 0, which was to make the run and has been silent for "
                    f"{_SILENT_S:.0f} s: look at rank 0's output."
                ) from None
    answer = json.loads(store.get(_ANSWER))
    store.add(_HEARD, 1)
    if "code" in answer:
        raise _refused(answer["code"])
    run = RunDir(answer["path"])
    deadline = time.monotonic() + _VISIBLE_S
    while not run.plan.is_file():
        if time.monotonic() > deadline:
            raise ConfigError(
                f"rank {rank} on {os.uname().nodename} cannot see {run.path}, which rank 0 has made: output_dir and "
                "data.cache_dir must lie on a file system that all nodes share."
            )
        time.sleep(0.5)
    return run


def _refused(code: int) -> RefusedError:
    error = RefusedError("rank 0 has refused to start")
    error.exit_code = code
    return error


def _publish(store: Any, answer: dict[str, Any]) -> None:
    if store is None:
        return
    with contextlib.suppress(RuntimeError):
        store.set(_ANSWER, json.dumps(answer))
        # Where this process holds the store, the others must hear before it ends.
        deadline = time.monotonic() + 5.0
        while "code" in answer and store.add(_HEARD, 0) < number_of_ranks() - 1 and time.monotonic() < deadline:
            time.sleep(0.05)


@contextlib.contextmanager
def _beating(store: Any) -> Iterator[None]:
    """Tell the other ranks that this one lives."""
    done = threading.Event()

    def beat() -> None:
        with contextlib.suppress(RuntimeError):
            while not done.wait(_BEAT_S):
                store.add(_BEAT, 1)

    thread = threading.Thread(target=beat, name="beat", daemon=True)
    if store is not None:
        thread.start()
    try:
        yield
    finally:
        done.set()
        if store is not None:
            thread.join()


def _use_cpu_if_told() -> None:
    """accelerate launch --cpu: no GPU is to be seen by the plan or by torch."""
    if os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def _note_a_lost_launch() -> None:
    """On CPU accelerate launch starts one process whatever --num_processes says, unless MPI does it."""
    if "MASTER_PORT" in os.environ and "ACCELERATE_USE_CPU" in os.environ and "RANK" not in os.environ:
        print(
            "note: this is the only rank. On a CPU accelerate launch starts several with mpirun_config alone; "
            "`dist-train run RECIPE parallel.processes_per_node=N` or torchrun do without MPI.",
            flush=True,
        )


def _parent_command() -> str:
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return "the launcher's command line is not known"
    return shlex.join(word.decode(errors="replace") for word in words if word)


def _measure(config: RunConfig, prepared: Path, out: Path, precision: str) -> None:
    """In this process, which imports torch anyway."""
    from dist_train.activation_profile import measure_for

    measure_for(config, prepared, out, precision)
