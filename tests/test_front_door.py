"""The real command: run, kill, resume, bad input. Slow tests share their runs."""

from __future__ import annotations

import base64
import gzip
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import xml.dom.minidom
from pathlib import Path

import pytest

from tests.front_door import (
    TICKET_SETTINGS,
    TICKET_STEPS,
    alive,
    dist_train,
    environment,
    final_shards,
    lines,
    losses,
    rank_pids,
    run_tickets,
    start,
    wait_for_step,
)

pytestmark = pytest.mark.front_door

RUN_FILES = """config.yaml plan.json commands.sh metrics.jsonl events.jsonl environment.json data.json report.json
report.md report.html predictions/test.parquet predictions/validation.parquet logs/rank0.log logs/rank1.log
best/config.json best/model.safetensors best/tokenizer.json"""


def _assert_same_result(run: Path, whole: Path) -> None:
    assert losses(run) == losses(whole)
    assert len(losses(run)) == TICKET_STEPS
    assert final_shards(run) == final_shards(whole)


def test_a_run_leaves_everything_and_says_where_it_is(desk: Path) -> None:
    run = desk / "runs" / "whole2"
    for name in RUN_FILES.split():
        assert (run / name).is_file(), name
    report = json.loads((run / "report.json").read_text())
    for name in ("accuracy", "macro_f1"):
        entry = report["metrics"]["test"][name]
        assert entry["low"] <= entry["value"] <= entry["high"]
        assert report["baselines"]["ngram"]["test"][name]["value"] > 0
    text = (desk / "whole2.txt").read_text()
    assert str(run / "report.html") in text.replace("\n", "")
    assert "next:" in text
    first = lines(run / "metrics.jsonl")[0]
    assert first["step"] == 1
    assert {"step", "samples", "split", "loss", "attempt"} <= set(first)


def test_the_report_needs_nothing_from_outside_and_shows_any_label_as_text(desk: Path) -> None:
    run = desk / "runs" / "whole2"
    html = (run / "report.html").read_text()
    assert "<i>access" not in html
    assert "&lt;i&gt;access&lt;/i&gt;|$x_1" in html
    sources = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert len(sources) == 4
    assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    for source in sources:
        xml.dom.minidom.parseString(base64.b64decode(source.partition(",")[2]))
    assert "<script" not in html
    assert "| <i>access</i>\\|$x_1 |" in (run / "report.md").read_text()


def test_the_report_says_where_the_time_of_a_step_went(desk: Path) -> None:
    run = desk / "runs" / "whole2"
    ranks = json.loads((run / "report.json").read_text())["profile"]
    assert len(ranks) == 2
    for rank in ranks:
        assert rank["steps"] == 2
        assert 0 < rank["exposed_communication_s"] <= rank["communication_s"] < rank["seconds"]
        parts = [*rank["phases_s"].values(), rank["exposed_communication_s"]]
        assert min(parts) > 0
        assert 0.5 * rank["seconds"] < sum(parts) < rank["seconds"]
        assert len(rank["operations"]) == 10
    assert ranks[0]["operations"][0]["name"] in (run / "report.html").read_text()
    trace = json.loads(gzip.decompress((run / "profile" / "rank1.trace.json.gz").read_bytes()))
    assert any(event.get("name") == "gloo:all_reduce" for event in trace["traceEvents"])


def test_a_report_is_the_same_when_it_is_made_again_and_another_checkpoint_can_be_evaluated(desk: Path) -> None:
    run = desk / "runs" / "whole2"
    before = json.loads((run / "report.json").read_text())
    assert dist_train(["report", "runs/whole2"], desk).returncode == 0
    again = json.loads((run / "report.json").read_text())
    assert again == before
    steps = [path.name.removeprefix("step-").lstrip("0") for path in sorted((run / "checkpoints").iterdir())]
    step = next(each for each in steps if int(each) != before["training"]["best_step"])
    model = (run / "best" / "model.safetensors").read_bytes()
    done = dist_train(["eval", "runs/whole2", "--checkpoint", step], desk)
    assert done.returncode == 0, done.stdout + done.stderr
    other = run / "evaluations" / f"step-{int(step):08d}"
    assert str(other / "report.html") in done.stdout
    assert json.loads((other / "report.json").read_text())["metrics"] != before["metrics"]
    assert json.loads((run / "report.json").read_text()) == before, "the run's own result is that of its best"
    assert (run / "best" / "model.safetensors").read_bytes() == model
    shutil.rmtree(json.loads((run / "data.json").read_text())["folder"])
    done = dist_train(["eval", "runs/whole2"], desk)
    assert done.returncode == 0, "the prepared data was cleared, so it is made again: " + done.stderr
    assert json.loads((run / "report.json").read_text())["metrics"] == before["metrics"]
    missing = dist_train(["eval", "runs/whole2", "--checkpoint", "7"], desk)
    assert missing.returncode == 11
    assert "Checkpoints that are there" in missing.stderr
    assert re.search(r"whole2 .*finished", dist_train(["runs"], desk).stdout), "an evaluation trains nothing"


def test_two_runs_at_once_repeat_a_run_from_its_directory(desk: Path) -> None:
    both = [start(["run", "runs/whole2/config.yaml", f"name=again{index}"], desk) for index in (1, 2)]
    outputs = [process.communicate(timeout=240)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    for index in (1, 2):
        _assert_same_result(desk / "runs" / f"again{index}", desk / "runs" / "whole2")
    listed = dist_train(["runs"], desk).stdout
    assert re.search(rf"again1 .*finished.*{TICKET_STEPS}/{TICKET_STEPS}.*accuracy", listed)
    different = dist_train(["runs", "diff", "whole2", "whole4"], desk).stdout
    assert re.search(r"parallel.processes_per_node\s+│ 2\s+│ 4", different)
    assert "optim.lr" not in different


def test_debug_runs_one_rank_in_the_very_process(desk: Path) -> None:
    arguments = ["run", "ticket_routing", "name=debug", *TICKET_SETTINGS, "train.steps=3", "--debug"]
    done = dist_train(arguments, desk)
    assert done.returncode == 0, done.stdout + done.stderr
    records = lines(desk / "runs" / "debug" / "events.jsonl")
    assert not [record for record in records if record["event"] == "rank_started"], "a rank of its own was started"
    assert (desk / "runs" / "debug" / "report.html").is_file()
    refused = dist_train([*run_tickets("debug2", 2), "--debug"], desk)
    assert refused.returncode == 2
    assert "parallel.processes_per_node=1" in refused.stderr
    assert not (desk / "runs" / "debug2").exists()


@pytest.mark.parametrize("victim", ["rank", "launcher"])
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.matrix)])
def test_a_killed_run_goes_on_bit_identical(desk: Path, ranks: int, victim: str) -> None:
    run = desk / "runs" / f"killed-{victim}-{ranks}"
    process = start(run_tickets(run.name, ranks), desk)
    wait_for_step(run, 23)
    deadline = time.monotonic() + 30
    while not (run / "checkpoints" / "step-00000020").is_dir():  # saved in the background
        assert time.monotonic() < deadline
        time.sleep(0.01)
    pids = rank_pids(run)
    os.kill(pids[ranks - 1] if victim == "rank" else process.pid, signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    if victim == "rank":
        assert process.returncode == 15
        assert f"rank {ranks - 1} (process {pids[ranks - 1]}) was killed" in output
    deadline = time.monotonic() + 5
    while any(alive(pid) for pid in pids.values()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in pids.values() if alive(pid)], "a rank was left behind"
    newest = max(int(folder.name.removeprefix("step-")) for folder in (run / "checkpoints").glob("step-*"))
    assert 20 <= newest < TICKET_STEPS
    resumed = dist_train(["resume", f"runs/{run.name}"], desk)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert f"resumed at step {newest}" in resumed.stdout
    _assert_same_result(run, desk / "runs" / f"whole{ranks}")


def test_ctrl_c_saves_the_step_it_is_at_and_the_run_goes_on_from_there(desk: Path) -> None:
    run = desk / "runs" / "stopped"
    process = start(run_tickets(run.name), desk)
    wait_for_step(run, 13)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "is saved" in output
    assert re.search(r"stopped .* stopped ", dist_train(["runs"], desk).stdout)
    stopped_at = max(line["step"] for line in lines(run / "metrics.jsonl"))
    resumed = dist_train(["resume", f"runs/{run.name}"], desk)
    assert f"resumed at step {stopped_at}" in resumed.stdout, resumed.stdout + resumed.stderr
    _assert_same_result(run, desk / "runs" / "whole2")


def test_ctrl_c_while_the_ranks_still_import_saves_the_first_step(desk: Path) -> None:
    run = desk / "runs" / "early"
    process = start(run_tickets(run.name), desk)
    deadline = time.monotonic() + 60
    while len([line for line in lines(run / "events.jsonl") if line["event"] == "rank_started"]) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert "after step 1; the checkpoint of that step is saved" in output


def test_a_run_under_nohup_whose_output_nobody_reads_any_more_goes_on_to_its_report(desk: Path) -> None:
    run = desk / "runs" / "unread"
    process = start(run_tickets(run.name), desk, under=["nohup"])
    wait_for_step(run, 5)
    assert process.stdout is not None
    process.stdout.close()
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=120) == 0
    _assert_same_result(run, desk / "runs" / "whole2")
    assert (run / "report.html").is_file()


@pytest.mark.parametrize("redirect", [">&-", ">&- 2>&-", ">/dev/full", "| true"])
def test_output_that_cannot_be_written_stops_nothing(desk: Path, redirect: str) -> None:
    command = f"{shlex.quote(sys.executable)} -m launcher runs {redirect}"
    repository = str(Path(__file__).parent.parent)
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"],
        cwd=desk,
        env=environment(desk, PYTHONPATH=repository),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert ("no more output can be written" in done.stderr) == (redirect == ">/dev/full")


def test_a_config_that_was_edited_between_attempts_needs_a_word_to_go_on(desk: Path) -> None:
    run = desk / "runs" / "edited"
    arguments = [*run_tickets(run.name, 1), "train.stop_after_steps=2", "eval.every_steps=2"]
    assert dist_train(arguments, desk).returncode == 0
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("  weight_decay: 0.1", "  weight_decay: 0.2"))
    refused = dist_train(["resume", f"runs/{run.name}", "train.stop_after_steps=4"], desk)
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert "the config changed since the checkpoint was saved" in refused.stderr
    resumed = dist_train(["resume", f"runs/{run.name}", "train.stop_after_steps=4", "--accept", "config"], desk)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "resumed at step 2" in resumed.stdout
    text = (run / "config.yaml").read_text()
    assert re.search(r"global_batch_size: 15  # command line\n", text), "where a value was set is kept over a resume"
    assert re.search(r"stop_after_steps: 4  # command line, on resume\n", text)


def test_a_stopped_rank_is_named_and_nothing_is_left_behind(desk: Path) -> None:
    run = desk / "runs" / "hung"
    process = start([*run_tickets(run.name), "parallel.timeout_s=6"], desk)
    wait_for_step(run, 5)
    pids = rank_pids(run)
    os.kill(pids[1], signal.SIGSTOP)
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 14, output
    assert "Missing: rank 1 (silent since step" in output
    assert not [pid for pid in pids.values() if alive(pid)]


def test_a_live_run_and_an_existing_name_are_refused(desk: Path) -> None:
    run = desk / "runs" / "live"
    process = start(run_tickets(run.name), desk)
    wait_for_step(run, 2)
    resumed = dist_train(["resume", "runs/live"], desk)
    assert resumed.returncode == 12
    assert "in use by a live run" in resumed.stderr
    again = dist_train(run_tickets("live"), desk)
    assert again.returncode == 12
    assert "dist-train resume" in again.stderr
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)


def test_all_checkpoints_damaged_is_exit_11_and_never_a_fresh_start(desk: Path) -> None:
    run = desk / "runs" / "damaged"
    shutil.copytree(desk / "runs" / "whole2", run)
    before = (run / "metrics.jsonl").read_bytes()
    for shard in (run / "checkpoints").glob("step-*/rank-00000*"):
        shard.write_bytes(shard.read_bytes()[:-1])
    resumed = dist_train(["resume", f"runs/{run.name}"], desk)
    assert resumed.returncode == 11, resumed.stdout + resumed.stderr
    assert "rank-00000-of-00002.safetensors" in resumed.stderr
    assert (run / "metrics.jsonl").read_bytes() == before, "it trained"
