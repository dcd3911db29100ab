"""Rows that are evaluated now, but that the model which a run starts from was trained on. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dist_train.init_from import earlier_runs
from dist_train.rundir import read_json
from recipes.ticket_routing.earlier import Earlier

_FILE = "trained.npy"


def write_trained(folder: Path, texts: np.ndarray) -> None:
    """Keep the signs of the training texts with the prepared data, for the runs that will start from this one.

    texts: hash of each training row's normalised text, [n] uint64.
    """
    np.save(folder / _FILE, np.unique(texts))


def count_trained_before(earlier: Earlier, texts: Mapping[str, np.ndarray]) -> tuple[dict[str, int], list[str]]:
    """texts: the hashes of each split that is evaluated. How many of its rows the model was trained on word for word,
    itself or the one that it started from; and warnings, also where that cannot be told."""
    seen = {split: np.zeros(len(hashes), dtype=bool) for split, hashes in texts.items()}
    runs = earlier_runs(earlier.folder)
    gone = []
    for run in runs:
        file = Path(read_json(run.data_facts)["folder"]) / _FILE
        if not file.is_file():
            gone.append(run.name)
            continue
        trained = np.load(file, mmap_mode="r")
        for split, hashes in texts.items():
            seen[split] |= np.isin(hashes, trained)
    counts = {split: int(rows.sum()) for split, rows in seen.items()}
    warnings = [
        f"{count} of {len(seen[split])} {split} rows were trained on by the model that this run starts from, so that "
        "its scores there are too high. Give new tickets alone, or test on the newest with data.time_column"
        for split, count in counts.items()
        if count
    ]
    if gone or not runs:
        whose = f"of {', '.join(gone)}" if gone else f"behind {earlier.folder}"
        warnings.append(
            f"the data {whose} is not there any more: whether the model that this run starts from was trained on rows "
            "that are evaluated now cannot be told"
        )
    return counts, warnings
