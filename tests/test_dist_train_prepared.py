"""Prepared data is built once, exists whole or not at all, and outlives whatever kills the preparation."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from dist_train import prepared, worker_pool
from dist_train.errors import CrashError, DataError, StorageError
from tests import worker_jobs
from tests.front_door import mounted


def _recipe(tmp_path: Path, content: str = "one", build: Any = None) -> tuple[Any, Any, list[str]]:
    """A recipe whose data is one word, and what its `build` has done."""
    built: list[str] = []

    def write(config: Any, folder: Path, say: Any) -> dict[str, Any]:
        built.append(content)
        prepared.write_split(folder, "train", pa.table({"word": [content]}))
        return {"splits": {"train": {"rows": 1}}}

    data = SimpleNamespace(describe=lambda config: {"content": content}, build=build or write)
    config = SimpleNamespace(data=SimpleNamespace(cache_dir=tmp_path / "cache"))
    return config, SimpleNamespace(name="words", data=data), built


def _quiet(text: str) -> None:
    pass


def test_data_is_built_once_and_found_again_by_its_content(tmp_path: Path) -> None:
    config, recipe, built = _recipe(tmp_path)
    folder = prepared.prepare(config, recipe, _quiet)
    assert prepared.prepare(config, recipe, _quiet) == folder
    assert built == ["one"]
    assert folder.name.startswith("words-")
    assert prepared.read_split(folder, "train")["word"].to_pylist() == ["one"]
    assert prepared.load_facts(folder)["splits"] == {"train": {"rows": 1}}
    assert prepared.prepare(*_recipe(tmp_path, "two")[:2], _quiet) != folder


def test_a_folder_that_lacks_a_file_or_has_a_cut_one_is_built_again(tmp_path: Path) -> None:
    config, recipe, built = _recipe(tmp_path)
    folder = prepared.prepare(config, recipe, _quiet)
    (folder / "train.arrow").write_bytes(b"")
    assert not prepared.is_whole(folder)
    assert prepared.prepare(config, recipe, _quiet) == folder
    (folder / "train.arrow").unlink()
    prepared.prepare(config, recipe, _quiet)
    assert built == ["one"] * 3
    assert prepared.is_whole(folder)


def test_a_build_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail(config: Any, folder: Path, say: Any) -> dict[str, Any]:
        (folder / "half").write_text("half")
        raise DataError("row 3 is no row")

    config, recipe, _ = _recipe(tmp_path, build=fail)
    with pytest.raises(DataError, match="row 3"):
        prepared.prepare(config, recipe, _quiet)
    assert [path.name for path in (tmp_path / "cache").iterdir() if not path.name.endswith(".lock")] == []


def test_two_preparations_at_once_build_the_data_once(tmp_path: Path) -> None:
    config, recipe, built = _recipe(tmp_path)
    threads = [threading.Thread(target=prepared.prepare, args=(config, recipe, _quiet)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert built == ["one"]


def test_a_folder_that_another_process_has_finished_meanwhile_is_kept(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "word").write_text(name)
        prepared.commit(tmp_path / name, tmp_path / "folder", {})
    assert (tmp_path / "folder" / "word").read_text() == "first"
    assert not (tmp_path / "second").exists()


def test_a_disk_that_lacks_the_space_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    said: list[str] = []
    with mounted(tmp_path / "small", "size=9m") as place:
        prepared.check_space(place / "not" / "there", 8 * 2**20, 0, said.append)
        with pytest.raises(StorageError, match=r"takes about 20 MiB.*has 9 MiB free.*data.cache_dir"):
            prepared.check_space(place, 20 * 2**20, 0, said.append)
        prepared.check_space(place, 20 * 2**20, 12 * 2**20, said.append)
    assert "takes about 8 MiB" in said[0]


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
