"""What a rank does as a process, whatever it trains: end with its launcher, write its own log. Torch-free."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
from pathlib import Path

from dist_train.errors import CrashError
from dist_train.events import current_attempt
from dist_train.rundir import ATTEMPT, LAUNCHER_PID, RunDir

_PR_SET_PDEATHSIG = 1


def own_run(path: str) -> tuple[RunDir, int]:
    """The run as this rank's node writes it, and the attempt. torchrun calls the node's rank GROUP_RANK."""
    attempt = os.environ.get(ATTEMPT) or current_attempt(RunDir(path).events)
    return RunDir(path, int(os.environ.get("GROUP_RANK", "0"))), int(attempt)


def redirect_output(path: Path) -> None:
    """Everything this rank prints, native code included, goes to its own log."""
    path.parent.mkdir(exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR2)  # the launcher asks for the stacks when a rank hangs


def die_with_launcher() -> None:
    """Have the kernel kill this rank when its parent dies, so that no killed launcher leaves training behind."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    launcher = os.environ.get(LAUNCHER_PID)
    if launcher is not None and not Path(f"/proc/{launcher}").exists():
        os._exit(CrashError.exit_code)  # it died before we could ask for that
