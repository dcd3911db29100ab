"""The toolkit's training beside a raw torch DDP loop: same model, batches, ranks and threads, interleaved.

    python -m benchmarks.raw_loop ticket_routing/demo train.ema_decay=null --ranks 2 --steps 60 --repeats 5

The raw loop is what one would write by hand: DistributedDataParallel, no_sync, fused AdamW, clipping, the local loss
read each step. It keeps no moving average: set train.ema_decay=null. Its batches are the toolkit's own and lie ready
before the clock starts. Prints one JSON line: samples a second, medians over the repeats, and their quotient.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("recipe")
    parser.add_argument("settings", nargs="*")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=10)
    asked = parser.parse_args()
    seen: dict[str, list[float]] = {"toolkit": [], "raw": []}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(asked.repeats):
            study = Path(folder) / f"repeat{repeat}"
            run = study / f"ddp-1x{asked.ranks}-r0"
            # The raw loop reads what the toolkit's run was made of.
            for name in ("toolkit", "raw") if repeat % 2 == 0 else ("raw", "toolkit"):
                if name == "raw" and not run.is_dir():
                    run = Path(folder) / f"repeat{repeat - 1}" / run.name
                rate = _toolkit(asked, study) if name == "toolkit" else _raw(asked, run)
                seen[name].append(rate)
                print(f"{name:8s} {rate:,.1f} samples/s", file=sys.stderr, flush=True)
    medians = {name: statistics.median(values) for name, values in seen.items()}
    figures = {
        **{f"{name}_samples_per_s": round(value, 1) for name, value in medians.items()},
        "quotient": round(medians["toolkit"] / medians["raw"], 4),
        "by_repeat": {name: [round(value, 1) for value in values] for name, values in seen.items()},
        "ranks": asked.ranks,
        "steps": asked.steps,
    }
    print(json.dumps(figures))


def _toolkit(asked: argparse.Namespace, study: Path) -> float:
    words = [*asked.settings, f"output_dir={study.parent}", f"name={study.name}", "track.wandb=disabled"]
    sizes = ["--gpus-per-node", str(asked.ranks), "--steps", str(asked.steps), "--warm-up", str(asked.warm_up)]
    command = [sys.executable, "-m", "launcher", "scale", asked.recipe, *words, *sizes, "--repeat", "1"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return float(json.loads((study / "scale.json").read_text())["sizes"][0]["samples_per_s"])


def _raw(asked: argparse.Namespace, run: Path) -> float:
    output = run.parent / "raw.json"
    threads = str(max(1, len(os.sched_getaffinity(0)) // asked.ranks))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={asked.ranks}"]
    words = [str(run), str(asked.warm_up), str(asked.steps), str(output)]
    environment = {"OMP_NUM_THREADS": threads, **os.environ}
    subprocess.run([*command, "-m", "benchmarks.raw_loop_rank", *words], check=True, env=environment)
    return float(json.loads(output.read_text())["samples_per_s"])


if __name__ == "__main__":
    main()
