"""Workers of a preparation answer in order, end with the command, and run no script of the user's again."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_train import worker_pool
from dist_train.errors import CrashError, DataError
from tests import worker_jobs


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers after the first job."""
    monkeypatch.setattr(worker_pool, "_ALONE_S", 0.0)
    monkeypatch.setattr(worker_pool.os, "sched_getaffinity", lambda pid: {0, 1})


def test_workers_answer_in_order(at_once: None) -> None:
    answers = list(worker_pool.map_in_workers(worker_jobs.tell, [(number,) for number in range(6)]))
    assert [answer["number"] for answer in answers] == list(range(6))
    assert len({answer["pid"] for answer in answers}) > 1


def test_a_killed_worker_and_a_failed_job_are_said(at_once: None) -> None:
    with pytest.raises(CrashError, match="a worker process of the preparation was killed"):
        list(worker_pool.map_in_workers(worker_jobs.die, [(number,) for number in range(4)]))
    with pytest.raises(DataError, match="row 2 is bad"):
        list(worker_pool.map_in_workers(worker_jobs.fail, [(number,) for number in range(4)]))


def test_bad_data_behind_long_jobs_is_answered_at_once(at_once: None) -> None:
    def jobs() -> Iterator[tuple[int]]:
        yield from ((number,) for number in (0, 1, 3, 4))
        raise DataError("row 5 is no row")

    began = time.monotonic()
    with pytest.raises(DataError, match="row 5"):
        list(worker_pool.map_in_workers(worker_jobs.linger, jobs()))
    assert time.monotonic() - began < 30, "a job that lingers takes 60 s"


def test_no_worker_outlives_a_killed_command_nor_runs_its_script_again(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os; from dist_train import worker_pool; from tests import worker_jobs\n"
        "worker_pool._ALONE_S = 0.0; os.sched_getaffinity = lambda pid: {0, 1}\n"
        "for answer in worker_pool.map_in_workers(worker_jobs.linger, [(n,) for n in range(9)]):\n"
        "    print(__name__, answer, flush=True)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, str(script)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        (name, own), (other, worker) = (process.stdout.readline().split() for _ in range(2))
        process.kill()
    assert name == other == "__main__"
    assert int(own) == process.pid != int(worker)
    worker_jobs.wait_for_end(int(worker))
