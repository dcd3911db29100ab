"""What each rank of `dist-train launch` runs: the user's own script, as `python train.py` would, with our bookkeeping.

python -m dist_train.user_script RUN_DIR (-m MODULE | SCRIPT) [its arguments]
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import runpy
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from dist_train.errors import ConfigError, CrashError, StorageError, ToolkitError
from dist_train.events import log_event
from dist_train.rank_process import die_with_launcher, own_run, redirect_output
from dist_train.rundir import ATTEMPT, CODE, LAUNCHER_PID, RunDir


def main(arguments: list[str]) -> int:
    """Run the script to its end. Returns the exit code; the cause of a failure is in events.jsonl."""
    (run, attempt), command = own_run(arguments[0]), arguments[1:]
    rank = int(os.environ.get("RANK", "0"))
    die_with_launcher()
    redirect_output(run.rank_log(rank))
    log_event(run.events, "rank_started", attempt=attempt, rank=rank, pid=os.getpid(), host=os.uname().nodename)
    try:
        script = _prepare(command)
        if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" and os.environ.get("DS_ACCELERATOR") == "cpu":
            from dist_train.engine import join_cpu_ranks

            join_cpu_ranks()
        code = _run(script)
    except ToolkitError as error:
        print(f"{error.title}: {error}", file=sys.stderr, flush=True)
        return _report(run, attempt, rank, error)
    except BaseException as error:
        traceback.print_exception(type(error), error, _own_part(error))
        last = traceback.format_exception_only(error)[-1].strip()
        return _report(run, attempt, rank, CrashError(f"rank {rank}: {last}{_place(error, command[0])}"))
    if code != 0:
        return _report(run, attempt, rank, CrashError(f"rank {rank}: the script ended with exit code {code}."))
    log_event(run.events, "rank_finished", attempt=attempt, rank=rank)
    return 0


def _prepare(arguments: list[str]) -> Callable[[], object]:
    """Set sys.argv and sys.path as python does for a script or `-m`, and return what runs it."""
    code = os.environ.get(CODE)
    for name in ("PYTHONSAFEPATH", LAUNCHER_PID, ATTEMPT, CODE):
        os.environ.pop(name, None)  # ours; the script's own processes are to know nothing of it
    if arguments[0] == "-m":
        module = arguments[1]
        sys.path.insert(0, code or os.getcwd())
        sys.argv = arguments[1:]
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            found = None
        if found is None:
            raise ConfigError(f"there is no module {module} to run, on the path or in {code or os.getcwd()}.")
        return lambda: runpy.run_module(module, run_name="__main__", alter_sys=True)
    path = arguments[0]
    sys.path.insert(0, str(Path(path).resolve().parent))
    sys.argv = list(arguments)
    return lambda: runpy.run_path(path, run_name="__main__")


def _run(script: Callable[[], object]) -> int:
    """The exit code of the script. What it raises passes through."""
    try:
        script()
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    return 0


def _own_part(error: BaseException) -> TracebackType | None:
    """The traceback from the user's own code on, without what started it."""
    part = error.__traceback__
    while part is not None and part.tb_frame.f_code.co_filename in (__file__, "<frozen runpy>"):
        part = part.tb_next
    return part or error.__traceback__


def _place(error: BaseException, path: str) -> str:
    """Where in the user's own file the error came from; empty where its file is not in the traceback."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename == path:
            return f" ({Path(path).name}:{frame.lineno})"
    return ""


def _report(run: RunDir, attempt: int, rank: int, error: ToolkitError) -> int:
    with contextlib.suppress(OSError, StorageError):
        log_event(run.events, "failed", attempt=attempt, rank=rank, code=error.exit_code, message=str(error))
    return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
