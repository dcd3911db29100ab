"""Throughput and peak memory of every strategy on the GPUs of this machine, through the real command.

    python -m benchmarks.gpu_check --steps 60

Each run goes through `accelerate launch` with its generated config. Prints one JSON line a strategy; a run that fails
says so in its line. Never executed on several GPUs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

from dist_train.events import read_lines
from dist_train.hardware import detect_hardware
from dist_train.rundir import RunDir
from tests.front_door import dist_train

SETTINGS = ["data.rows=20000", "model.layers=8", "model.width=512", "model.heads=8", "model.feedforward=2048"]
CASES = [
    *(("single", "fp32", []), ("single", "bf16", []), ("ddp", "bf16", [])),
    *((f"zero{stage}", "bf16", []) for stage in (1, 2, 3)),
    *(("zero3", "bf16", ["parallel.offload=parameters"]), ("fsdp", "bf16", [])),
    *(("single", "bf16", ["train.compile=true"]), ("single", "bf16", ["train.activation_checkpointing=true"])),
    *(("single", "bf16", ["train.deterministic=true"]), ("single", "fp16", [])),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    if not detect_hardware().gpus:
        sys.exit("no NVIDIA GPU is visible here: nothing was measured")
    with tempfile.TemporaryDirectory() as folder:
        for index, (strategy, precision, more) in enumerate(CASES):
            own = [f"parallel.strategy={strategy}", f"train.precision={precision}", f"name=case-{index}", *more]
            length = ["train.epochs=null", f"train.steps={options.steps}", "track.wandb=disabled"]
            done = dist_train(["run", "ticket_routing/demo", *SETTINGS, *length, *own], Path(folder))
            case = {"strategy": strategy, "precision": precision, "settings": more}
            if done.returncode != 0:
                print(json.dumps({**case, "failed": done.stderr[-400:]}), flush=True)
                continue
            lines = list(read_lines(RunDir(Path(folder) / "runs" / f"case-{index}").metrics))
            trained = [line for line in lines if line["split"] == "train"][2:]  # the first ones warm up
            rates = [line["samples_per_s"] for line in trained]
            memory = max(line["memory_gib"] for line in trained)
            speed = {"samples_per_s": round(statistics.median(rates), 1), "peak_gib": round(memory, 2)}
            print(json.dumps({**case, **speed, "last_loss": trained[-1]["loss"]}), flush=True)


if __name__ == "__main__":
    main()
