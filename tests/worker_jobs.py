"""What the tests of worker_pool have its workers do."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time

from dist_train.errors import DataError
from tests.front_door import alive


def tell(number: int) -> dict[str, int]:
    time.sleep(0.3)  # so that one worker cannot do it all
    return {"number": number, "pid": os.getpid()}


def die(number: int) -> None:
    if number == 2 and multiprocessing.parent_process() is not None:
        os.kill(os.getpid(), signal.SIGKILL)


def fail(number: int) -> None:
    if number == 2:
        raise DataError("row 2 is bad")


def linger(number: int) -> int:
    if number > 2:
        time.sleep(60)
    return os.getpid()


def wait_for_end(pid: int) -> None:
    deadline = time.monotonic() + 10
    while alive(pid):
        assert time.monotonic() < deadline, f"{pid} lives on"
        time.sleep(0.05)
