"""events.jsonl: what happened in a run, one JSON object a line, appended by launcher and ranks. Torch-free."""

from __future__ import annotations

import errno
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dist_train.rundir import storage_error


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Append `record` as one line in a single write, so that lines of several processes never mix.

    JSON has no NaN: a non-finite number becomes null, and `nonfinite` names the keys. StorageError when
    the line cannot be written.
    """
    clean = {key: _finite(value) for key, value in record.items()}
    broken = [key for key, value in record.items() if clean[key] is None and value is not None]
    if broken:
        clean["nonfinite"] = broken
    line = (json.dumps(clean, allow_nan=False) + "\n").encode()
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            written = os.write(descriptor, line)
            if written < len(line):
                # The disk is full. Half a line would spoil the next one.
                os.ftruncate(descriptor, os.fstat(descriptor).st_size - written)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(descriptor)
    except OSError as error:
        raise storage_error(path, error) from error


def log_event(path: Path, event: str, **fields: Any) -> None:
    """Append the event with the time in Unix seconds."""
    append_line(path, {"time": round(time.time(), 3), "event": event, **fields})


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a JSONL file; a last line cut short by a crash is passed over."""
    if not path.is_file():
        return
    with open(path, encoding="utf-8", errors="replace") as stream:
        for line in stream:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(record, dict):
                yield record


def current_attempt(events: Path) -> int:
    """The number of the attempt that started last, 0 before the first."""
    return max((int(record.get("attempt", 0)) for record in read_lines(events)), default=0)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
