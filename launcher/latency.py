"""dist-train latency: how long one row takes, from its raw form to its answer, with one thread and with all."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dist_train.errors import DataError
from dist_train.hardware import detect_hardware
from dist_train.records import read_records
from dist_train.rundir import RunDir, find_model_folder, write_json
from launcher.process import run_together

STAGES = {"encode": "read and preprocess", "forward": "network", "answer": "decide", "total": "all of it"}


def measure(path: str, source: str, rows: int) -> None:
    """Print the percentiles, and keep them in the run's latency.json where `path` is a run."""
    folder = find_model_folder(path)
    if next(read_records(source), None) is None:  # what is no table and no folder of images is said before torch starts
        raise DataError(f"{source} has no rows.")
    hardware = detect_hardware()
    cores = len(os.sched_getaffinity(0))
    results = []
    for threads in dict.fromkeys((1, cores)):
        with tempfile.TemporaryDirectory(prefix="dist-train-latency-") as place:
            out = Path(place) / "latency.json"
            command = [sys.executable, "-P", "-m", "dist_train.latency", str(folder), source, str(out)]
            limits = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
            run_together([[*command, str(threads), str(rows)]], {**os.environ, "PYTHONSAFEPATH": "1", **limits})
            results.append(json.loads(out.read_text(encoding="utf-8")))
    machine = {"cpu": hardware.cpu, "cores": cores, "gpus": [gpu.name for gpu in hardware.gpus]}
    measured = {"machine": machine, "time": time.strftime("%Y-%m-%dT%H:%M:%S"), "source": source, "results": results}
    _show(measured)
    run = RunDir(folder.parent)
    if run.config.is_file():
        write_json(run.latency, measured)
        print(f"kept in {run.latency}; `dist-train report {run.path}` puts it into the report")


def _show(measured: dict[str, Any]) -> None:
    console = Console(soft_wrap=True)
    machine = measured["machine"]
    for result in measured["results"]:
        where = ", ".join(machine["gpus"]) if result["device"] != "cpu" else machine["cpu"]
        table = Table(
            title=f"one row at a time, milliseconds; {result['threads']} thread(s), {result['rows']} rows, {where}",
            title_justify="left",
        )
        table.add_column("stage")
        percentiles = list(result["ms"]["total"])
        for name in percentiles:
            table.add_column(name, justify="right")
        for stage, words in STAGES.items():
            table.add_row(words, *(f"{result['ms'][stage][name]:.2f}" for name in percentiles))
        console.print(table)
