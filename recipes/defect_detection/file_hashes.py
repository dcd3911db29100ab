"""sha256 of many files: hashed once, then known by path, size and time of change. Torch-free."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dist_train.errors import StorageError
from dist_train.rundir import write_atomic

# A file that changed just now may change again within the same tick of the clock.
_SETTLED_S = 2.0
_THREADS = 8
_known: dict[str, tuple[int, int, str]] = {}


def hash_files(paths: Sequence[str], cache: Path, name: str) -> list[str]:
    """The sha256 of each file, "" for one that is not there or cannot be read.

    name: of the source, whose memo in the cache folder is read and brought up to date.
    """
    memo = cache / "hashes" / f"{hashlib.sha256(name.encode()).hexdigest()[:24]}.json"
    kept = _read(memo)
    stats = [_stat(path) for path in paths]
    result, fresh = [""] * len(paths), []
    for index, (path, stat) in enumerate(zip(paths, stats, strict=True)):
        known = kept.get(path) or _known.get(path)
        if stat is not None and known is not None and known[:2] == stat:
            result[index] = known[2]
        elif stat is not None:
            fresh.append(index)
    if not fresh:
        return result
    with ThreadPoolExecutor(_THREADS) as pool:
        for index, digest in zip(fresh, pool.map(_digest, [paths[index] for index in fresh]), strict=True):
            result[index] = digest
    settled = (time.time() - _SETTLED_S) * 1e9
    memorable = {}
    for path, stat, digest in zip(paths, stats, result, strict=True):
        if stat is not None and digest:
            _known[path] = (*stat, digest)
            if stat[1] < settled:
                memorable[path] = _known[path]
    if any(kept.get(path) != value for path, value in memorable.items()):
        _write(memo, kept | memorable)
    return result


def _stat(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def _digest(path: str) -> str:
    try:
        with open(path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError:
        return ""


def _read(memo: Path) -> dict[str, tuple[int, int, str]]:
    try:
        values = json.loads(memo.read_bytes())
        return {path: (int(size), int(changed), str(digest)) for path, (size, changed, digest) in values.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def _write(memo: Path, values: dict[str, tuple[int, int, str]]) -> None:
    try:
        memo.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(memo, json.dumps(values))
    except (OSError, StorageError):
        return  # a help for the next start, no more; what cannot be written is said where the data is kept
