"""The launcher's pieces: commands and environments of the ranks, what is shown, locks, lists."""

from __future__ import annotations

import dataclasses
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from dist_train.errors import BusyError, ConfigError, CrashError, HangError, StorageError
from dist_train.events import append_line, log_event, read_lines
from dist_train.hardware import Hardware
from dist_train.heartbeat import missing_ranks
from dist_train.plan import LaunchPlan, make_plan
from dist_train.rank_environment import strategy_environment
from dist_train.rundir import RunDir, write_atomic
from dist_train.stop import StopFlag
from launcher import doctor, recipes_list
from launcher.accelerate_config import accelerate_config, launch_command, worker_environment
from launcher.preflight import check_deepspeed_build, check_imports
from launcher.process import Supervisor
from launcher.runs import output_folder
from launcher.watch import Watch
from tests.fakes import TinyConfig
from tests.front_door import mounted
from tests.test_dist_train_plan import CPU, NODE


def _plan(hardware: Hardware, ranks: int | None) -> LaunchPlan:
    config = TinyConfig(recipe="tiny", train={"steps": 40}, parallel={"processes_per_node": ranks})
    return make_plan(config, hardware, 1000)


def test_the_accelerate_config_leaves_no_key_to_the_users_default_file(tmp_path: Path) -> None:
    from accelerate.commands.config.config_args import ClusterConfig

    written = accelerate_config(_plan(NODE, None), tmp_path / "deepspeed.json")
    (tmp_path / "accelerate.yaml").write_text(yaml.safe_dump(written))
    read = ClusterConfig.from_yaml_file(str(tmp_path / "accelerate.yaml"))
    assert (read.num_processes, read.mixed_precision, read.main_process_port) == (4, "bf16", 0)
    required = {
        field.name
        for field in dataclasses.fields(ClusterConfig)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    assert required <= set(written)
    assert "auto" not in written.values()


@pytest.mark.parametrize(
    ("hardware", "ranks", "words"),
    [
        (CPU, 1, ["-m dist_train.worker /r"]),
        (CPU, 2, ["-m torch.distributed.run --standalone", "--nproc-per-node=2", "-m dist_train.worker /r"]),
        (NODE, None, ["-m accelerate.commands.launch --config_file /r/accelerate.yaml -m dist_train.worker /r"]),
    ],
)
def test_one_cpu_rank_is_a_process_several_are_torchrun_and_gpus_are_accelerate(
    hardware: Hardware, ranks: int | None, words: list[str]
) -> None:
    command = launch_command(_plan(hardware, ranks), RunDir("/r"), ("--accept=code",))
    line = " ".join(command)
    assert command[:2] == [sys.executable, "-P"]
    assert line.endswith("--accept=code")
    for word in words:
        assert word in line


def test_what_another_launcher_left_in_the_environment_does_not_reach_the_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("ACCELERATE_MIXED_PRECISION", "RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "9")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    environment = worker_environment(_plan(CPU, 2), CPU)
    assert not {"ACCELERATE_MIXED_PRECISION", "RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"} & set(environment)
    assert environment["PYTHONSAFEPATH"] == "1"
    assert environment["OMP_NUM_THREADS"] == "4"
    assert environment["CUDA_VISIBLE_DEVICES"] == ""


def test_the_chosen_gpus_are_handed_on_by_their_uuids() -> None:
    plan = dataclasses.replace(_plan(NODE, 2), gpu_ids=("3", "GPU-bbbb"))
    assert worker_environment(plan, NODE)["CUDA_VISIBLE_DEVICES"] == "GPU-dddddddd,GPU-bbbbbbbb"
    assert worker_environment(_plan(NODE, 2), NODE)["CUDA_VISIBLE_DEVICES"] == "GPU-aaaaaaaa,GPU-bbbbbbbb"


@pytest.mark.parametrize(("strategy", "torchrun"), [("ddp", False), ("single", False), ("zero1", True), ("fsdp", True)])
def test_what_shards_has_a_process_group_on_one_cpu_rank_too(strategy: str, torchrun: bool) -> None:
    plan = dataclasses.replace(_plan(CPU, 1), strategy=strategy)
    assert ("torch.distributed.run" in launch_command(plan, RunDir("/r"))) == torchrun


def test_zero_on_a_cpu_asks_for_what_deepspeed_compiles_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr("dist_train.rank_environment.sysconfig.get_path", lambda name: str(tmp_path / "nowhere"))
    expected = r"zero2, and on a CPU .* ninja \(pip install ninja\) and a C\+\+ compiler, no-such-compiler \(apt-get"
    with pytest.raises(ConfigError, match=expected):
        check_deepspeed_build("zero2", "cpu")
    for strategy, device in (("zero2", "cuda"), ("ddp", "cpu")):
        check_deepspeed_build(strategy, device)
    monkeypatch.setattr("launcher.preflight.importlib.util.find_spec", lambda name: None if name == "deepspeed" else 1)
    check_imports("fsdp")
    with pytest.raises(ConfigError, match="deepspeed cannot be imported"):
        check_imports("zero1")


def test_ninja_beside_our_python_is_put_on_the_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr("dist_train.rank_environment.sysconfig.get_path", lambda name: str(tmp_path))
    assert "PATH" not in strategy_environment("cpu", "zero1", False)
    (tmp_path / "ninja").write_text("#!/bin/sh")
    (tmp_path / "ninja").chmod(0o755)
    assert strategy_environment("cpu", "zero1", False)["PATH"] == f"{tmp_path}:/nowhere"


def test_off_a_terminal_progress_is_plain_lines(tmp_path: Path) -> None:
    run, stream = RunDir(tmp_path), io.StringIO()
    watch = Watch(run, _plan(CPU, 1), 40, stream)
    line = {"step": 10, "split": "train", "loss": 0.5, "samples_per_s": 64.0, "padding_share": 0.1}
    append_line(run.metrics, line)
    append_line(run.metrics, {"step": 10, "split": "validation", "loss": 0.4, "accuracy": 0.9})
    log_event(run.events, "resumed", step=9, summary="weights")
    with open(run.metrics, "a") as torn:
        torn.write('{"step": 20, "spl')
    watch()
    assert stream.getvalue().splitlines() == [
        "resumed at step 9: weights",
        "step 10/40  loss 0.5000  64 samples/s  padding 10%  0:30 left",
        "step 10  validation: loss 0.4000  accuracy 0.9000",
    ]
    with open(run.metrics, "a") as rest:
        rest.write('it": "validation", "loss": 0.3}\n')
    watch()
    assert stream.getvalue().splitlines()[-1] == "step 20  validation: loss 0.3000"


def test_a_long_evaluation_is_told_of_while_it_goes_on(tmp_path: Path) -> None:
    run, stream = RunDir(tmp_path), io.StringIO()
    watch = Watch(run, _plan(CPU, 1), 40, stream)
    for moment, done in ((100.0, 10), (102.0, 30)):
        append_line(run.events, {"time": moment, "event": "evaluating", "split": "test", "done": done, "total": 90})
        watch._shown_at = -100.0  # as if the last line were long ago
        watch()
    log_event(run.events, "progress", message="writing the report")
    watch()
    assert stream.getvalue().splitlines() == [
        "evaluating the test split: 10 of 90 batches",
        "evaluating the test split: 30 of 90 batches  0:06 left",
        "writing the report",
    ]


def test_a_number_that_is_not_finite_is_null_and_named(tmp_path: Path) -> None:
    append_line(tmp_path / "x.jsonl", {"loss": float("nan"), "norm": float("inf"), "lr": 0.1, "none": None})
    with open(tmp_path / "x.jsonl", "a") as stream:
        stream.write('{"torn": ')
    expected = {"loss": None, "norm": None, "lr": 0.1, "none": None, "nonfinite": ["loss", "norm"]}
    assert list(read_lines(tmp_path / "x.jsonl")) == [expected]


def test_a_line_that_a_full_disk_cuts_short_is_taken_back(tmp_path: Path) -> None:
    with mounted(tmp_path / "small", "size=16k") as folder:
        path = folder / "x.jsonl"
        whole = {"text": "y" * 3000}
        for _ in range(4):
            append_line(path, whole)
        with pytest.raises(StorageError, match="the disk is full"):
            append_line(path, {"text": "y" * 6000})
        assert list(read_lines(path)) == [whole] * len(path.read_bytes().splitlines())
        assert path.read_bytes().endswith(b"\n")


def test_the_runs_of_the_sites_output_folder_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert output_folder(None) == "runs"
    (tmp_path / "dist-train").mkdir()
    (tmp_path / "dist-train" / "site.yaml").write_text("output_dir: scratch\n")
    assert output_folder(None) == str(tmp_path / "dist-train" / "scratch")
    assert output_folder("here") == "here"


def test_lines_of_several_processes_never_mix(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from dist_train.events import append_line\n"
        "for i in range(100): append_line(Path(sys.argv[1]), {'writer': int(sys.argv[2]), 'index': i, 't': 'x' * 500})"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "x.jsonl")]
    for process in [subprocess.Popen([*command, str(number)]) for number in range(3)]:
        assert process.wait() == 0
    records = list(read_lines(tmp_path / "x.jsonl"))
    assert len(records) == 300
    for number in range(3):
        assert [record["index"] for record in records if record["writer"] == number] == list(range(100))


def test_a_file_is_written_whole_or_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    write_atomic(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "new \ud800")
    assert path.read_text() == "old"
    write_atomic(path, "new")
    assert path.read_text() == "new"


def test_a_run_directory_is_made_whole_or_not_at_all(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "runs" / "mine")
    with pytest.raises(UnicodeEncodeError):
        run.create({"config.yaml": "seed: 1\n", "data.json": "\ud800"})
    assert list(run.path.parent.iterdir()) == []
    run.create({"config.yaml": "seed: 1\n"})
    assert run.config.read_text() == "seed: 1\n"
    with pytest.raises(BusyError, match="exists already"):
        run.create({"config.yaml": "seed: 2\n"})
    assert run.config.read_text() == "seed: 1\n"
    (run.path.parent / "file").write_text("kept")
    with pytest.raises(BusyError, match="exists already"):
        RunDir(run.path.parent / "file").create()
    assert sorted(path.name for path in run.path.parent.iterdir()) == ["file", "mine"]


def test_a_directory_that_a_live_process_holds_is_seen_and_refused(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    code = (
        "import sys, time; from dist_train.rundir import RunDir\n"
        "with RunDir(sys.argv[1]).locked(): print(1, flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()
    assert run.is_locked()
    with pytest.raises(BusyError, match=f"in use by a live run .pid {holder.pid}"), run.locked():
        pass
    holder.kill()
    holder.communicate()
    # A lock that its process left by dying is free.
    assert not run.is_locked()
    with run.locked():
        pass


def test_the_rank_that_the_others_wait_for_is_named(tmp_path: Path) -> None:
    now = time.time()
    for rank, (step, when) in enumerate([(7, now), (6, now), (7, now)]):
        (tmp_path / f"rank{rank}").write_text(f"{step} {when}\n")
    assert missing_ranks(tmp_path, 3) == ["rank 1 (still in step 6)"]
    (tmp_path / "rank2").write_text(f"7 {now - 60}\n")
    assert missing_ranks(tmp_path, 3) == ["rank 2 (silent since step 7)"]
    assert missing_ranks(tmp_path, 4)[-1] == "rank 3 (silent since step -1)"


def test_the_missing_rank_is_named_where_nccl_has_killed_those_that_waited(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.create()
    run.heartbeats.mkdir()
    run.plan.write_text('{"world_size": 3}')
    supervisor = Supervisor(run, 1)
    now = time.time()
    for rank, when in enumerate((now - 20, now - 60, now - 20)):
        log_event(run.events, "rank_started", attempt=1, rank=rank, pid=2**22 + 1 + rank)
        (run.heartbeats / f"rank{rank}").write_text(f"7 {when}\n")
        if rank != 1:
            run.rank_log(rank).write_text("[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(…) ran …\n")
    supervisor._vanished = {0: 1, 2: 3}
    with pytest.raises(HangError, match=r"Missing: rank 1 \(silent since step 7\)\."):
        supervisor._raise_cause(1)
    run.rank_log(0).write_text("no such word\n")
    run.rank_log(2).write_text("no such word\n")
    with pytest.raises(CrashError, match=r"rank 0 .* was killed from outside"):
        supervisor._raise_cause(1)


def test_a_signal_sets_the_flag_and_ends_nothing() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        flag = StopFlag()
        flag.install()
        assert not flag
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)  # as one more of those that a stopped group of processes gets
        assert flag
        assert flag.signal_name == "SIGUSR1"
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_the_lists_name_every_recipe_and_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    recipes_list.print_recipes()
    assert "ticket_routing/demo" in capsys.readouterr().out
    recipes_list.print_keys("ticket_routing")
    shown = capsys.readouterr().out
    assert "train.global_batch_size = 64   (a whole number above 0)" in shown
    assert "Samples of one optimizer step over all ranks" in shown


def test_the_doctor_tells_the_fix_of_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert doctor.print_checks()
    assert "ready." in capsys.readouterr().out
    (tmp_path / "dist-train").mkdir()
    (tmp_path / "dist-train" / "site.yaml").write_text("seed: [\n")
    assert not doctor.print_checks()
    shown = capsys.readouterr().out
    assert "bad   site file" in shown
    assert "fix: mend the line" in shown
