"""Reads what W&B keeps of an offline run: records of its protocol in LevelDB's log format."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

_BLOCK = 32 * 1024
_START = 7
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


@dataclass
class OfflineRun:
    run_id: str = ""
    name: str = ""
    group: str = ""
    job_type: str = ""
    tags: list[str] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)


def read_offline_runs(folder: Path) -> list[OfflineRun]:
    """Those below FOLDER/wandb, in the order of their names."""
    return [_read(path) for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"))]


def _read(path: Path) -> OfflineRun:
    found = OfflineRun()
    for data in _records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.HasField("run"):
            run = record.run
            found.run_id, found.name, found.group = run.run_id, run.display_name, run.run_group
            found.job_type, found.tags = run.job_type, list(run.tags)
        elif record.HasField("history"):
            found.history.append(_values(record.history.item))
        elif record.HasField("summary"):
            found.summary |= _values(record.summary.update)
    return found


def _values(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def _records(data: bytes) -> Iterator[bytes]:
    assert data[:4] == b":W&B"
    place, parts = _START, b""
    while place + 7 <= len(data):
        if _BLOCK - place % _BLOCK < 7:
            place += _BLOCK - place % _BLOCK  # the rest of a block is too small for a header
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (_FULL, _LAST):
            yield parts
            parts = b""
