"""Stage prepared data onto each node's own disk: one rank of a node copies, verified, and the others wait for it.

Torch-free. A staged folder exists whole or not at all, and is found again by later runs; it may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from pathlib import Path
from typing import Any

from dist_train.config_io import recorded_sources
from dist_train.errors import CrashError, StorageError, error_for_code
from dist_train.events import log_event, read_lines
from dist_train.rundir import RunDir, fsync_folder, read_json, unwritable, write_json

_POLL_S = 0.1
_BLOCK = 1 << 20
# They say what a folder's content is: a staged copy with others is of something else.
_SOURCE_RECORDS = ("facts.json", "fetched.json")
# Size and hash of each file that was copied. The source may gain files later, a report's baselines for example.
_RECORD = "staged.json"


def staged_folder(run: RunDir, attempt: int, facts: dict[str, Any], to: Path) -> Path:
    """The copy below `to` of the prepared folder that the run's `facts` name, with what lies beside it.

    Every rank calls it. StorageError, on all ranks of the node, when the copy cannot be made.
    """
    source = Path(facts["folder"])
    beside = [Path(os.path.normpath(source / folder)) for folder in facts.get("beside", [])]
    root = Path(os.path.commonpath([source.parent, *beside]))
    targets = {folder: to / folder.relative_to(root) for folder in (source, *beside)}
    if os.environ.get("LOCAL_RANK", "0") != "0":
        _wait_for_copy(run, attempt)
        return targets[source]
    began = time.monotonic()
    try:
        copied = _stage(run, targets, to)
    except OSError as error:
        raise unwritable(to, error, "data.stage_to") from error
    seconds = round(time.monotonic() - began, 3)
    host = os.uname().nodename
    log_event(run.events, "staged", attempt=attempt, host=host, folder=str(to), copied_bytes=copied, seconds=seconds)
    return targets[source]


def _stage(run: RunDir, targets: dict[Path, Path], to: Path) -> int:
    """Copy what is not there yet. Returns the bytes that were copied."""
    from filelock import FileLock

    for source in targets:
        if not source.is_dir():
            raise StorageError(f"{source} is gone: `dist-train resume {run.path}` makes it again, and stages it.")
    to.mkdir(parents=True, exist_ok=True)
    with FileLock(to / ".stage.lock"):  # another run of this node may stage the same
        missing = {source: target for source, target in targets.items() if not _is_copy(source, target)}
        needed = sum(size for source in missing for size in _sizes(source).values())
        _check_room(run, to, needed)
        if missing:
            message = f"copying {needed / 2**20:.1f} MiB of prepared data to {to} on {os.uname().nodename}"
            log_event(run.events, "progress", message=message)
        for source, target in missing.items():
            _copy(source, target)
    return needed


def _copy(source: Path, target: Path) -> None:
    """Into a folder beside, each file read back and compared by its hash; then one rename."""
    temporary = target.with_name(f".tmp-{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)  # what a killed run left; we hold the lock
    copied: dict[str, dict[str, Any]] = {}
    try:
        for name, size in _sizes(source).items():
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            copied[name] = {"bytes": size, "sha256": _copy_file(source / name, temporary / name)}
            if copied[name]["sha256"] != _sha256(temporary / name):
                raise StorageError(
                    f"{target / name} is not what was written: the disk behind data.stage_to is damaged. Choose "
                    "another one, or set data.stage_to to null."
                )
        write_json(temporary / _RECORD, copied)
        shutil.rmtree(target, ignore_errors=True)  # of other content
        os.rename(temporary, target)
        fsync_folder(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _copy_file(source: Path, target: Path) -> str:
    """Copy the content, whatever kind of link leads to it. Returns its sha256."""
    digest = hashlib.sha256()
    with open(source, "rb") as read, open(target, "wb") as written:
        while block := read.read(_BLOCK):
            digest.update(block)
            written.write(block)
        written.flush()
        os.fsync(written.fileno())
    return digest.hexdigest()


def _sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _is_copy(source: Path, target: Path) -> bool:
    """Whether `target` is a whole copy: of this very content, and each file of the size that was copied."""
    try:
        copied = read_json(target / _RECORD)
        return all((target / name).stat().st_size == described["bytes"] for name, described in copied.items()) and all(
            (source / name).read_bytes() == (target / name).read_bytes()
            for name in _SOURCE_RECORDS
            if (source / name).is_file()
        )
    except (OSError, StorageError):
        return False


def _sizes(folder: Path) -> dict[str, int]:
    """Size of each file by its path below the folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}


def _check_room(run: RunDir, to: Path, needed: int) -> None:
    free = shutil.disk_usage(to).free
    if needed <= free:
        return
    where = recorded_sources(run).get("data.stage_to")
    raise StorageError(
        f"data.stage_to is {to}, which has {free / 2**20:.1f} MiB free on {os.uname().nodename}, but the copy needs "
        f"{needed / 2**20:.1f} MiB: free some space, choose another disk, or set data.stage_to to null, which reads "
        f"the data where it was prepared.{f' Set in: {where}.' if where else ''}"
    )


def _wait_for_copy(run: RunDir, attempt: int) -> None:
    """Until the rank of this node that copies has said that it is done, or that it failed."""
    host = os.uname().nodename
    while True:
        for record in read_lines(run.events):
            if record.get("attempt") != attempt:
                continue
            if record["event"] == "staged" and record["host"] == host:
                return
            if record["event"] == "failed" and record["code"] != CrashError.exit_code:
                raise error_for_code(record["code"])(str(record["message"]))
            if record["event"] == "failed":
                raise CrashError(f"rank {record['rank']} failed while this one waited for the staged data")
        time.sleep(_POLL_S)
