"""What a rank does as a process, whatever it trains: end with its launcher, write its own log. Torch-free."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
from pathlib import Path

from dist_train.errors import CrashError
from dist_train.rundir import LAUNCHER_PID

_PR_SET_PDEATHSIG = 1


def redirect_output(path: Path) -> None:
    """Everything this rank prints, native code included, goes to its own log."""
    path.parent.mkdir(exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    faulthandler.enable()


def die_with_launcher() -> None:
    """Have the kernel kill this rank when its parent dies, so that no killed launcher leaves training behind."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    launcher = os.environ.get(LAUNCHER_PID)
    if launcher is not None and not Path(f"/proc/{launcher}").exists():
        os._exit(CrashError.exit_code)  # it died before we could ask for that
