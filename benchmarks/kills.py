"""Kill a run at random moments until it ends, and compare it with one that nobody touched.

    python -m benchmarks.kills --kills 20 --ranks 4

Prints one JSON line: kills, attempts, and whether loss curve and final checkpoint are bit-identical.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from tests.front_door import dist_train, final_shards, losses, rank_pids, start, write_tickets

# fmt: off
SETTINGS = ["data.path=tickets.csv", "data.label_column=queue", "data.cache_dir=prepared", "train.global_batch_size=15",
            "model.layers=1", "model.width=32", "model.heads=2", "model.feedforward=64", "eval.every_steps=50",
            "eval.bootstrap_samples=100", "checkpoint.every_steps=5", "track.log_every_steps=1"]
# fmt: on


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    generator = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        desk = Path(folder)
        write_tickets(desk / "tickets.csv")
        settings = [*SETTINGS, f"train.steps={options.steps}", f"parallel.processes_per_node={options.ranks}"]
        whole = dist_train(["run", "ticket_routing", "name=whole", *settings], desk)
        assert whole.returncode == 0, whole.stderr
        run = desk / "runs" / "killed"
        command, kills = ["run", "ticket_routing", "name=killed", *settings], 0
        while True:
            process = start(command, desk)
            command = ["resume", "runs/killed"]
            if kills < options.kills and _kill_someone(process, run, generator):
                kills += 1
            output, _ = process.communicate(timeout=300)
            if process.returncode == 0:
                break
            assert process.returncode in (15, -signal.SIGKILL), output
            if not (run / "config.yaml").exists():
                command = ["run", "ticket_routing", "name=killed", *settings]
        same_losses = losses(run) == losses(desk / "runs" / "whole")
        same_files = final_shards(run) == final_shards(desk / "runs" / "whole")
        record = {"ranks": options.ranks, "kills": kills, "same_losses": same_losses, "same_checkpoint": same_files}
        print(json.dumps(record))


def _kill_someone(process: subprocess.Popen[str], run: Path, generator: random.Random) -> bool:
    """SIGKILL the launcher or one rank, from starting up to evaluating. False if the run has ended before."""
    end = time.monotonic() + generator.uniform(3.0, 12.0)
    while time.monotonic() < end:
        if process.poll() is not None:
            return False
        time.sleep(0.002)
    try:
        pids = [process.pid, *rank_pids(run).values()]
        os.kill(generator.choice(pids), signal.SIGKILL)
    except (ValueError, ProcessLookupError):
        process.kill()
    return True


if __name__ == "__main__":
    main()
