"""Baselines are trained once for each prepared folder, and their predictions kept beside it. Torch-free."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

SPLITS = ("validation", "test")
Tables = dict[tuple[str, str], pa.Table]
"""Predictions by baseline and split."""


def kept_baselines(
    prepared: Path,
    described: Any,
    names: list[str],
    about: str,
    train: Callable[[Path], Tables],
    say: Callable[[str], None],
) -> dict[str, dict[str, pa.Table]]:
    """The predictions of each baseline for validation and test: read, or made by `train` and kept if the folder can be
    written.

    described: all that they depend on beside the prepared data. about: what is trained, for the user.
    """
    key = hashlib.sha256(json.dumps(described, default=str).encode()).hexdigest()[:8]
    folder = prepared / f"baselines-{key}"
    files = {(name, split): folder / f"{name}-{split}.parquet" for name in names for split in SPLITS}
    if all(path.is_file() for path in files.values()):
        tables = {place: pq.read_table(path) for place, path in files.items()}
    else:
        began = time.monotonic()
        say(f"training the baseline: {about}")
        tables = train(prepared)
        with contextlib.suppress(OSError):  # another user's cache, a read-only or a full one: trained again next time
            folder.mkdir(exist_ok=True)
            for place, table in tables.items():
                temporary = files[place].with_suffix(f".{os.getpid()}.tmp")
                pq.write_table(table, temporary)
                os.replace(temporary, files[place])
        say(f"baseline trained in {time.monotonic() - began:.1f} s")
    return {name: {split: tables[name, split] for split in SPLITS} for name in names}
