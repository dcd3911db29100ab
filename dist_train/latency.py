"""How long one row takes a model folder from its raw form to its answer: python -m dist_train.latency FOLDER SOURCE OUT
THREADS ROWS"""

from __future__ import annotations

import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dist_train.errors import ToolkitError
from dist_train.predict import Predictor
from dist_train.records import Record, read_records

PERCENTILES = (50, 95, 99)
STAGES = ("encode", "forward", "answer", "total")
"""Reading and preprocessing; the network; decision and thresholds; all of it."""
_WARM_UP = 20


def measure_latency(predictor: Predictor, records: list[Record], rows: int) -> dict[str, dict[str, float]]:
    """Percentiles in milliseconds, by stage, of `rows` rows that are answered one by one after a warm-up. Fewer records
    than that come round again."""
    stages: dict[str, list[float]] = {name: [] for name in STAGES}
    for index, record in enumerate(itertools.islice(itertools.cycle(records), _WARM_UP + rows)):
        times = predictor.timed([record])
        if index >= _WARM_UP:
            for name in STAGES[:-1]:
                stages[name].append(1000 * times[name])
            stages["total"].append(1000 * sum(times.values()))
    return {
        name: {f"p{percentile}": round(float(np.percentile(values, percentile)), 3) for percentile in PERCENTILES}
        for name, values in stages.items()
    }


def main(arguments: list[str]) -> int:
    """arguments: model folder, file or folder of rows, the JSON file to write, threads, number of rows."""
    folder, source, out, threads, rows = arguments
    torch.set_num_threads(int(threads))
    try:
        began = time.monotonic()
        predictor = Predictor(folder)
        loaded = time.monotonic() - began
        records = next(read_records(source, predictor.file_columns))
        measured: dict[str, Any] = {
            "threads": int(threads),
            "device": predictor.device_name,
            "rows": int(rows),
            "different_rows": min(len(records), int(rows)),
            "load_s": round(loaded, 3),
            "ms": measure_latency(predictor, records, int(rows)),
        }
    except ToolkitError as error:
        print(f"{error.title}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    Path(out).write_text(json.dumps(measured), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
