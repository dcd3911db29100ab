"""Start the real command as a user would, watch its run directory, and read what it left."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_EXTENSIONS = Path.home() / ".cache" / "torch_extensions" / f"py3{sys.version_info.minor}_cpu"
WORDS = {
    "network": ["vpn", "wifi", "router", "cable", "connection", "drops", "slow", "signal", "proxy", "firewall"],
    "hardware": ["laptop", "screen", "keyboard", "dock", "battery", "broken", "printer", "mouse", "fan", "monitor"],
    # A name that HTML, Markdown and matplotlib would each read as more than text.
    "<i>access</i>|$x_1": ["password", "account", "locked", "permission", "login", "reset", "role", "badge", "token"],
}
COMMON_TEXT = "please hello the my is not since monday team urgent help with on for again today"
COMMON = COMMON_TEXT.split()

_MOST_SECONDS = 10
TICKET_STEPS = 120
TICKET_SETTINGS = [
    "data.path=tickets.csv",
    "data.label_column=queue",
    "data.cache_dir=prepared",
    f"train.steps={TICKET_STEPS}",
    "train.global_batch_size=15",
    "model.layers=1",
    "model.width=32",
    "model.heads=2",
    "model.feedforward=64",
    "eval.every_steps=30",
    "eval.bootstrap_samples=100",
    "checkpoint.every_steps=10",
    "track.log_every_steps=1",
]


def run_tickets(name: str, ranks: int = 2) -> list[str]:
    """The command that trains a small model on the tickets of `write_tickets`."""
    return ["run", "ticket_routing", f"name={name}", *TICKET_SETTINGS, f"parallel.processes_per_node={ranks}"]


def write_tickets(path: Path, rows: int = 600, seed: int = 0) -> Path:
    """A CSV with the columns text and queue."""
    generator = random.Random(seed)
    with open(path, "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["text", "queue"])
        for _ in range(rows):
            queue = generator.choice(sorted(WORDS))
            words = generator.choices(COMMON, k=generator.randint(3, 20)) + generator.choices(WORDS[queue], k=3)
            generator.shuffle(words)
            writer.writerow([" ".join(words), queue])
    return path


def environment(tmp: Path, **extra: str) -> dict[str, str]:
    """No site file, cache or W&B account of the user."""
    return {
        **os.environ,
        "XDG_CONFIG_HOME": str(tmp / "config"),
        "XDG_CACHE_HOME": str(tmp / "cache"),
        "WANDB_MODE": "disabled",
        # DeepSpeed's operator for CPU ranks takes a minute to build: once for all tests.
        "TORCH_EXTENSIONS_DIR": os.environ.get("TORCH_EXTENSIONS_DIR", str(_EXTENSIONS)),
        **extra,
    }


def dist_train(arguments: list[str], cwd: Path, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "launcher", *arguments],
        cwd=cwd,
        env=environment(cwd, **{"PYTHONPATH": str(Path(__file__).parent.parent), **extra}),
        capture_output=True,
        text=True,
        timeout=300,
    )


def start(arguments: list[str], cwd: Path, under: Sequence[str] = (), **extra: str) -> subprocess.Popen[str]:
    """Start the command, and go on; under: what starts it, for example nohup."""
    return subprocess.Popen(
        [*under, sys.executable, "-m", "launcher", *arguments],
        cwd=cwd,
        env=environment(cwd, **{"PYTHONPATH": str(Path(__file__).parent.parent), **extra}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # Where the tests run in a shell's background they ignore Ctrl-C, and what they start would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def assert_refused(desk: Path, arguments: list[str], code: int, words: list[str], **variables: str) -> None:
    """`dist-train run` ends within seconds, with this code and one block that holds the words; nothing is changed."""
    before = _contents(desk)
    name = [] if any(word.startswith("name=") for word in arguments) else ["name=bad"]
    began = time.monotonic()
    done = dist_train(["run", *arguments, *name, "data.cache_dir=prepared"], desk, **variables)
    seconds = time.monotonic() - began
    assert done.returncode == code, done.stdout + done.stderr
    for word in words:
        assert word in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert done.stderr.strip().count("\n\n") == 0, "more than one block"
    assert not (desk / "runs" / "bad").exists()
    assert seconds < _MOST_SECONDS
    assert _contents(desk) == before, "something that existed was changed"


def _contents(desk: Path) -> dict[str, bytes]:
    return {
        str(path): path.read_bytes()
        for path in desk.rglob("*")
        if path.is_file() and "prepared" not in path.parts and "cache" not in path.parts
    }


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for_step(run: Path, step: int, timeout_s: float = 120) -> None:
    """Until the run has logged this step."""
    deadline = time.monotonic() + timeout_s
    while not any(line["step"] >= step for line in lines(run / "metrics.jsonl")):
        assert time.monotonic() < deadline, f"step {step} was not reached: {lines(run / 'events.jsonl')}"
        time.sleep(0.02)


def rank_pids(run: Path) -> dict[int, int]:
    """The ranks of the newest attempt."""
    started = [line for line in lines(run / "events.jsonl") if line["event"] == "rank_started"]
    newest = max(line["attempt"] for line in started)
    return {line["rank"]: line["pid"] for line in started if line["attempt"] == newest}


def losses(run: Path) -> dict[int, float]:
    """Training loss by step; where a step stands twice the last attempt counts."""
    return {line["step"]: line["loss"] for line in lines(run / "metrics.jsonl") if line["split"] == "train"}


def final_shards(run: Path) -> list[tuple[str, str]]:
    """Name and hash of each shard of the newest checkpoint."""
    folder = sorted((run / "checkpoints").glob("step-*"))[-1]
    payload = json.loads((folder / "manifest.json").read_text())["payload"]
    return [(shard["file"], shard["sha256"]) for shard in payload["shards"]]


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stream:
            return stream.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A file system of its own at `folder`. Skips where mounting is not allowed."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"needs the right to mount a small file system: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
