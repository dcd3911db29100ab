"""Processes that share the work of a preparation: as many as cores, and none outlives the command. Torch-free."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from dist_train import recipe
from dist_train.errors import CrashError

# Each holds some 100 to 200 MB, and one reader feeds them all.
MOST_WORKERS = 8
# Workers take about a second to start.
_ALONE_S = 1.0
_PR_SET_PDEATHSIG = 1


def map_in_workers(function: Callable[..., Any], jobs: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
    """function(*job) for each job, in order. Jobs are taken as they are needed, so that few are held at a time.

    What takes little time stays in this process, and so does everything where there is one core. CrashError when a
    worker was killed.
    """
    jobs, began = iter(jobs), time.monotonic()
    workers = min(len(os.sched_getaffinity(0)), MOST_WORKERS)
    for job in jobs:
        yield function(*job)
        if workers > 1 and time.monotonic() - began > _ALONE_S:
            break
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin, (os.getpid(),))
    waiting: deque[Future[Any]] = deque()
    try:
        for job in jobs:
            with _no_main():
                waiting.append(pool.submit(function, *job))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BaseException as error:
        # Bad data or Ctrl-C are answered at once; what the workers are at is lost, what they finished is kept.
        for process in list((pool._processes or {}).values()):
            process.kill()
        if not isinstance(error, BrokenProcessPool):
            raise
        raise CrashError(
            "a worker process of the preparation was killed, most often because the memory was used up.\n"
            "What was finished is kept: type the same command again to go on, with fewer programs beside it."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _begin(parent: int) -> None:
    """What a worker does first. Ctrl-C is for the command, which ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(CrashError.exit_code)  # it died before we could ask for that
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    recipe.import_shipped_recipes()  # before a job names a module of theirs


@contextmanager
def _no_main() -> Iterator[None]:
    """Keep new processes from importing the main module again: it may be a user's script without a guard."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
