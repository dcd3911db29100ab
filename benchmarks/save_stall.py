"""How long training stands still for a save: in the background against all at once.

    python -m benchmarks.save_stall --mebibytes 400 --repeats 7

Prints one JSON line: medians and spread in seconds, and their ratio.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from dist_train.held import whole
from dist_train.save import Saver


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mebibytes", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="Where to write; else the temporary folder.")
    options = parser.parse_args()
    # As many tensors as a model of some size has.
    held = [whole(f"model/{index}", torch.randn(options.mebibytes * 2**20 // 4 // 100)) for index in range(100)]
    seconds = {name: _stalls(held, name == "asynchronous", options) for name in ("asynchronous", "synchronous")}
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    record: dict[str, Any] = {"mebibytes": options.mebibytes}
    for name, values in seconds.items():
        record[name] = {
            "median_s": round(medians[name], 4),
            "min_s": round(min(values), 4),
            "max_s": round(max(values), 4),
        }
    record["ratio"] = round(medians["asynchronous"] / medians["synchronous"], 3)
    print(json.dumps(record))
    sys.stdout.flush()


def _stalls(held: list[Any], asynchronous: bool, options: argparse.Namespace) -> list[float]:
    """Seconds that each save kept its caller. Between two the writing may end, as training steps would let it."""
    engine: Any = SimpleNamespace(
        rank=0, world_size=1, device=torch.device("cpu"), gather_objects=lambda value: [value]
    )
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        saver = Saver(Path(folder), engine, asynchronous, lambda step, name: None)
        seconds = []
        for step in range(options.repeats + 1):
            saver.finish()
            start = time.perf_counter()
            saver.start(held, step, {"state": {}})
            seconds.append(time.perf_counter() - start)
        saver.finish()
    return seconds[1:]  # the first makes the buffers


if __name__ == "__main__":
    main()
