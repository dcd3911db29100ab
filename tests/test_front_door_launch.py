"""dist-train launch: users' own scripts, which know nothing of us, on two ranks."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import yaml

from tests.front_door import alive, dist_train, lines, rank_pids, start

pytestmark = pytest.mark.front_door

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"
# Says who it is, as a plain torchrun script would find out, and then does as its first argument says.
SCRIPT = """
import os, signal, sys, time
rank = int(os.environ["RANK"])
import beside
print("rank", rank, sys.argv, beside.VALUE, __name__, "PYTHONSAFEPATH" in os.environ, flush=True)
if sys.argv[1] == "raise" and rank == 1:
    print("the words before", flush=True)
    raise ValueError("no such shelf")
if sys.argv[1] == "exit":
    sys.exit(7)
if sys.argv[1] == "die" and rank == 1:
    os.kill(os.getpid(), 9)
if sys.argv[1] == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("deaf wait", flush=True)
if sys.argv[1] in ("wait", "deaf", "raise", "die"):
    time.sleep(300)
"""


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    """A user's folder with a script that imports its neighbour."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "train.py").write_text(SCRIPT)
    (tmp_path / "scripts" / "beside.py").write_text("VALUE = 'beside'")
    return tmp_path


def _launch(*words: str) -> list[str]:
    return ["launch", "--gpus-per-node", "2", "--name", "one", *words]


def test_an_accelerate_script_trains_the_same_under_ddp_and_zero2(tmp_path: Path) -> None:
    script = shutil.copy(EXAMPLES / "accelerate_script.py", tmp_path)
    shown = {}
    for strategy, kind in (("ddp", "MULTI_CPU"), ("zero2", "DEEPSPEED")):
        words = ["--gpus-per-node", "2", "--strategy", strategy, "--name", strategy, script]
        done = dist_train(["launch", *words, "--", "--steps", "20", "--output", f"{strategy}-out"], tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"2 x cpu, {kind}, no" in done.stdout
        assert (tmp_path / f"{strategy}-out" / "model.safetensors").is_file()
        run = tmp_path / "runs" / strategy
        for name in ("commands.sh", "environment.json", "accelerate.yaml", "events.jsonl", "logs/rank1.log"):
            assert (run / name).is_file(), name
        found = re.search(r"step 20  loss ([\d.]+)", done.stdout)
        assert found
        shown[strategy] = float(found[1])
    assert shown["ddp"] == pytest.approx(shown["zero2"], abs=1e-4)
    assert yaml.safe_load((run / "accelerate.yaml").read_text())["distributed_type"] == "DEEPSPEED"
    assert json.loads((run / "deepspeed.json").read_text())["train_batch_size"] == "auto"


def test_a_hugging_face_trainer_script_runs_on_two_ranks(tmp_path: Path) -> None:
    done = dist_train(_launch(str(EXAMPLES / "trainer_script.py"), "--", "--max_steps", "4"), tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 ranks, DistributedType.MULTI_CPU, 4 steps" in done.stdout or "2 ranks, MULTI_CPU, 4 steps" in done.stdout


def test_a_script_finds_itself_as_python_would_start_it(desk: Path) -> None:
    done = dist_train(_launch("scripts/train.py", "--", "--lr", "1e-3", "--"), desk)
    assert done.returncode == 0, done.stdout + done.stderr
    expected = "['scripts/train.py', '--lr', '1e-3', '--'] beside __main__ False"
    assert f"rank 0 {expected}" in done.stdout
    assert f"rank 1 {expected}" in (desk / "runs" / "one" / "logs" / "rank1.log").read_text()


def test_a_module_runs_by_its_name_and_one_that_is_not_there_is_named(desk: Path) -> None:
    (desk / "package").mkdir()
    (desk / "package" / "__init__.py").touch()
    (desk / "package" / "train.py").write_text("import sys; print('module', sys.argv[1:], __package__)")
    done = dist_train(_launch("-m", "package.train", "--lr", "1"), desk)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "module ['--lr', '1'] package" in done.stdout
    done = dist_train(["launch", "-m", "package.nothing"], desk)
    assert done.returncode == 2
    assert "there is no module package.nothing" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("raise", ["rank 1: ValueError: no such shelf (train.py:8)", "| the words before", "logs/rank1.log"]),
        ("exit", ["the script ended with exit code 7"]),
        ("die", ["rank 1 (process", "ended without a word, exit code -9", "| rank 1 ['scripts/train.py', 'die']"]),
    ],
)
def test_a_script_that_fails_names_the_rank_and_its_last_lines(desk: Path, word: str, expected: list[str]) -> None:
    done = dist_train(_launch("scripts/train.py", word), desk)
    assert done.returncode == 15
    for text in expected:
        assert text in done.stderr
    assert "torch/distributed" not in done.stderr
    assert not any(alive(pid) for pid in rank_pids(desk / "runs" / "one").values())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["nothing.py"], "nothing.py cannot be run: there is no such file"),
        (["package.train"], "To run a module: dist-train launch -m package.train"),
        (
            ["--strategy", "ddp", "--offload", "optimizer", "scripts/train.py"],
            "--offload is optimizer, which goes with",
        ),
        (["--strategy", "fsdp", "scripts/train.py"], "--strategy is fsdp, which Accelerate does not choose on a CPU"),
        (["--precision", "fp16", "scripts/train.py"], "--precision is fp16, which needs a GPU"),
        (["--name", "a/b", "scripts/train.py"], "--name is 'a/b'"),
        (["--nodes", "2", "scripts/train.py"], "parallel.nodes is 2"),
        (["--strategy", "zero9", "scripts/train.py"], "'zero9' is not one of"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_written(desk: Path, words: list[str], expected: str) -> None:
    done = dist_train(["launch", *words], desk)
    assert done.returncode == 2
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
    assert not (desk / "runs").exists()


@pytest.mark.parametrize("how", ["ctrl-c", "ctrl-c twice", "kill"])
def test_a_script_that_is_stopped_ends_within_seconds_and_leaves_no_process(desk: Path, how: str) -> None:
    process = start(_launch("scripts/train.py", "deaf" if "twice" in how else "wait"), desk)
    run = desk / "runs" / "one"
    deadline = time.monotonic() + 60
    logs = [run / "logs" / f"rank{rank}.log" for rank in range(2)]
    while not all(log.exists() and "wait" in log.read_text() for log in logs):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    pids = rank_pids(run).values()
    assert len(pids) == 2
    process.send_signal(signal.SIGKILL if how == "kill" else signal.SIGINT)
    if "twice" in how:
        time.sleep(1)
        assert process.poll() is None
        assert all(alive(pid) for pid in pids)
        process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=20)
    if how != "kill":
        assert process.returncode == 130
        assert "the ranks were ended by a signal" in output
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "a rank was left behind"
        time.sleep(0.05)
    told = [line["event"] for line in lines(run / "events.jsonl")]
    assert told == ["run_started", "rank_started", "rank_started", *(["attempt_failed"] if how != "kill" else [])]
