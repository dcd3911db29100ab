"""dist-train accept: what a user runs once on a new machine or cluster, with one table and a file to send in."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from dist_train.errors import ConfigError, CrashError, NumericError, StorageError
from dist_train.events import read_lines
from dist_train.hardware import detect_hardware
from dist_train.rundir import RunDir, write_json
from dist_train.start_run import environment_facts
from launcher.doctor import print_checks
from launcher.parity import check_parity
from launcher.start import git_state, resume, run, run_for_a_check
from launcher.summary import open_console

RECIPE = "ticket_routing/demo"
# Small enough for minutes on two cores, large enough that zero3 and fsdp shard.
_SETTINGS = ["data.rows=2000", "model.width=128", "track.wandb=disabled", "train.epochs=null", "train.steps=40"]
_KILL_SETTINGS = ["checkpoint.every_steps=5", "track.log_every_steps=1", "eval.bootstrap_samples=100"]
_PATIENCE_S = 300.0

Result = tuple[bool, str, Any]
"""(as it must be, in a few words, all that was seen)"""


def accept_machine(nodes: int | None, gpus_per_node: int | None, output: str) -> None:
    """Run every check, print the table and write `output`. NumericError when one is not as it must be."""
    if (nodes or 1) > 1:
        raise ConfigError(
            f"--nodes is {nodes}, but this command starts ranks on this machine alone: run it on each machine, without "
            "--nodes."
        )
    hardware = detect_hardware()
    ranks = gpus_per_node or len(hardware.gpus) or 2
    target = Path(output).absolute()
    if not target.parent.is_dir():
        raise StorageError(f"--output is {output}, but {target.parent} is no folder.")
    record: dict[str, Any] = {"environment": environment_facts(hardware, git_state(), None), "checks": {}}
    folder = tempfile.mkdtemp(prefix="dist-train-accept-")
    own = [*_SETTINGS, f"output_dir={folder}"]
    checks: dict[str, Callable[[], Result]] = {
        "doctor": _doctor,
        "collectives": lambda: _collectives(own, ranks),
        "parity of strategies": lambda: _parity(own, ranks),
        "kill and resume": lambda: _kill_and_resume(own, ranks),
    }
    for name, check in checks.items():
        print(f"\n== {name}", flush=True)
        started = time.monotonic()
        try:
            good, words, seen = check()
        except Exception as error:  # one check that breaks must not hide what the others saw
            print(f"failed: {error}")
            good, words, seen = False, str(error).splitlines()[0], str(error)
        seconds = round(time.monotonic() - started, 1)
        record["checks"][name] = {"good": good, "words": words, "seconds": seconds, "seen": seen}
        write_json(target, record)
    _print_table(record["checks"])
    print(f"all that was seen: {target}")
    bad = [name for name, entry in record["checks"].items() if not entry["good"]]
    if bad:
        raise NumericError(f"not as it must be: {', '.join(bad)}. Details: {target}; runs and logs: {folder}")
    shutil.rmtree(folder)


def _doctor() -> Result:
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        good = print_checks()
    print(text.getvalue())
    return good, "ready" if good else "something is missing", text.getvalue().splitlines()


def _collectives(settings: list[str], ranks: int) -> Result:
    chosen = [*settings, "name=bandwidth", f"parallel.processes_per_node={ranks}"]
    seen = json.loads(run_for_a_check(RECIPE, chosen, "--bandwidth").bandwidth.read_text())
    speeds = [f"{name} {max(sizes.values()):g} GB/s" for name, sizes in seen["gigabytes_per_s"].items()]
    return True, ", ".join(speeds) or "one rank: nothing is sent", seen


def _parity(settings: list[str], ranks: int) -> Result:
    outcomes = check_parity(RECIPE, settings, ranks, steps=5, tolerance=None)
    largest = max(outcome.differences["gradients"] for outcome in outcomes)
    return True, f"{len(outcomes)} cases, gradients within {largest:.1e}", [asdict(outcome) for outcome in outcomes]


def _kill_and_resume(settings: list[str], ranks: int) -> Result:
    """A rank is killed after a checkpoint; the resumed run must have the losses of one that nobody touched."""
    chosen = [*settings, *_KILL_SETTINGS, f"parallel.processes_per_node={ranks}"]
    whole = run(RECIPE, [*chosen, "name=whole"])
    folder = Path(next(word for word in settings if word.startswith("output_dir=")).partition("=")[2])
    killed = RunDir(folder / "killed")
    threading.Thread(target=_kill_when_saved, args=(killed, ranks - 1), daemon=True).start()
    try:
        run(RECIPE, [*chosen, "name=killed"])
        return False, "the run ended before the rank could be killed", None
    except CrashError as error:
        print(f"as intended: {str(error).splitlines()[0]}")
    reached = max(_losses(killed), default=0)
    if reached >= max(_losses(whole)):
        return False, "the rank was killed after the last step: nothing was left to resume", None
    resume(str(killed.path), [], [])
    before, after = _losses(whole), _losses(killed)
    same = before == after
    largest = max(abs(before[step] - after.get(step, float("nan"))) / abs(before[step]) for step in before)
    words = "losses bit-identical" if same else f"losses within {largest:.1e}"
    # On GPUs the kernels may sum in another order each time.
    good = same or (bool(detect_hardware().gpus) and largest <= 1e-3)
    return good, words, {"whole": before, "killed": after}


def _kill_when_saved(directory: RunDir, rank: int) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while time.monotonic() < deadline:
        events = list(read_lines(directory.events))
        pids = [event["pid"] for event in events if event["event"] == "rank_started" and event["rank"] == rank]
        if pids and any(event["event"] == "checkpoint_committed" for event in events):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pids[0], signal.SIGKILL)
            return
        time.sleep(0.02)


def _losses(directory: RunDir) -> dict[int, float]:
    lines = [line for line in read_lines(directory.metrics) if line["split"] == "train"]
    return {line["step"]: line["loss"] for line in sorted(lines, key=lambda line: line["attempt"])}


def _print_table(checks: dict[str, Any]) -> None:
    table = Table("check", "", "seen", "seconds", title="accept", title_justify="left", box=box.SIMPLE_HEAD)
    for name, entry in checks.items():
        table.add_row(name, "ok" if entry["good"] else "BAD", entry["words"], f"{entry['seconds']:.0f}")
    open_console().print(table)
