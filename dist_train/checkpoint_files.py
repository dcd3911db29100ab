"""Checkpoints as files: shards that are hashed while written, a manifest last, one rename; verify, list, prune.

Knows bytes and names, not tensors: torch-free, so that a kill at every system call can be tried in milliseconds.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dist_train.rundir import fsync_folder

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_STEP_FOLDER = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class Piece:
    """A contiguous flat range of one named tensor: elements start … start+length-1 of `shape`, flattened."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """safetensors' word: F32, F16, BF16, I64 …"""
    start: int
    length: int

    @property
    def key(self) -> str:
        return f"{self.name}@{self.start}"


@dataclass(frozen=True)
class Damage(Exception):  # noqa: N818 - a finding about a file, caught and reported
    """What is wrong with which file of a checkpoint."""

    file: Path
    what: str

    def __str__(self) -> str:
        return f"{self.file}: {self.what}"


def step_folder(root: Path, step: int) -> Path:
    return root / f"step-{step:08d}"


def committed_steps(root: Path) -> list[int]:
    """Steps of the checkpoints below `root`, newest first."""
    names = (_STEP_FOLDER.fullmatch(entry.name) for entry in root.iterdir()) if root.is_dir() else ()
    return sorted((int(match[1]) for match in names if match), reverse=True)


def write_shard(path: Path, pieces: list[tuple[Piece, memoryview]]) -> dict[str, Any]:
    """Write the pieces as one safetensors file, fsynced. Returns its entry of the manifest."""
    header: dict[str, Any] = {}
    offset = 0
    for piece, data in pieces:
        header[piece.key] = {
            "dtype": piece.dtype,
            "shape": [piece.length],
            "data_offsets": [offset, offset + data.nbytes],
        }
        offset += data.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data aligned to 8 bytes
    digest = hashlib.sha256()
    with open(path, "wb", buffering=0) as stream:
        blocks = [memoryview(len(text).to_bytes(8, "little")), memoryview(text), *(data for _, data in pieces)]
        for block in blocks:
            digest.update(block)
            _write_all(stream.fileno(), block)
        os.fsync(stream.fileno())
    return {
        "file": path.name,
        "bytes": 8 + len(text) + offset,
        "sha256": digest.hexdigest(),
        "pieces": [asdict(piece) for piece, _ in pieces],
    }


def _write_all(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def write_manifest(folder: Path, payload: dict[str, Any]) -> None:
    """The last file of a checkpoint: what belongs to it, and a hash of itself."""
    payload = {"format_version": FORMAT_VERSION, **payload}
    body = json.dumps(payload, sort_keys=True, allow_nan=False)
    text = json.dumps({"sha256": hashlib.sha256(body.encode()).hexdigest(), "payload": payload}, allow_nan=False)
    with open(folder / MANIFEST, "wb", buffering=0) as stream:
        _write_all(stream.fileno(), memoryview(text.encode()))
        os.fsync(stream.fileno())
    fsync_folder(folder)


def commit(temporary: Path, final: Path) -> None:
    """One rename makes the checkpoint exist; the parent's fsync makes that last."""
    older = final.with_name(f".trash-{final.name}-{os.getpid()}")
    if final.exists():
        # The same step saved again: the older copy steps aside until the new one stands.
        os.rename(final, older)
    os.rename(temporary, final)
    fsync_folder(final.parent)
    if older.exists():
        shutil.rmtree(older)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The verified manifest. Damage when it is missing, altered, of another step or of an unknown format."""
    path = folder / MANIFEST
    try:
        document = json.loads(path.read_bytes())
        payload = document["payload"]
        body = json.dumps(payload, sort_keys=True, allow_nan=False)
        intact = document["sha256"] == hashlib.sha256(body.encode()).hexdigest() and document.keys() == {
            "sha256",
            "payload",
        }
    except OSError as error:
        raise Damage(path, _reason(error)) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise Damage(path, "is not a manifest any more") from None
    if not intact:
        raise Damage(path, "does not match its own hash")
    if payload["format_version"] > FORMAT_VERSION:
        raise Damage(path, f"has format {payload['format_version']}; this version reads up to {FORMAT_VERSION}")
    if folder.name != step_folder(folder.parent, payload["step"]).name:
        raise Damage(path, f"belongs to step {payload['step']}")
    return payload


def verify(folder: Path) -> dict[str, Any]:
    """Read every byte against the manifest, which is returned. Damage names the first file that does not match."""
    payload = read_manifest(folder)
    for shard in payload["shards"]:
        path = folder / shard["file"]
        try:
            size = path.stat().st_size
            if size != shard["bytes"]:
                raise Damage(path, f"has {size} bytes instead of {shard['bytes']}")
            with open(path, "rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise Damage(path, _reason(error)) from None
        if digest != shard["sha256"]:
            raise Damage(path, "does not match its hash")
    return payload


def _reason(error: OSError) -> str:
    return "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"


def newest_valid(root: Path) -> tuple[dict[str, Any] | None, list[Damage]]:
    """The manifest of the newest checkpoint that verifies, and what is wrong with the newer ones."""
    damages: list[Damage] = []
    for step in committed_steps(root):
        try:
            return verify(step_folder(root, step)), damages
        except Damage as damage:
            damages.append(damage)
    return None, damages


def prune(root: Path, keep_last: int) -> list[int]:
    """Remove all but the newest `keep_last` checkpoints and the best that each of these knows: whichever of them a
    resume falls back to, its best is there. Returns the removed steps."""
    protected = {_best_step(step_folder(root, step)) for step in committed_steps(root)[:keep_last]}
    removed = [step for step in committed_steps(root)[keep_last:] if step not in protected]
    for step in removed:
        discard(step_folder(root, step))
    return removed


def _best_step(folder: Path) -> int | None:
    try:
        step: int | None = read_manifest(folder).get("state", {}).get("best_step")
    except Damage:
        return None
    return step


def set_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint so that it is no candidate any more, and keep it."""
    target = folder.with_name(f"damaged-{folder.name}")
    count = 1
    while target.exists():
        count += 1
        target = folder.with_name(f"damaged-{folder.name}-{count}")
    os.rename(folder, target)
    return target


def discard(folder: Path) -> None:
    """Remove a folder so that a kill half-way leaves nothing that looks like a checkpoint."""
    trash = folder.with_name(f".trash-{folder.name}-{os.getpid()}")
    os.rename(folder, trash)
    shutil.rmtree(trash)


def clean(root: Path) -> None:
    """Remove what killed saves and removals left. Only for the holder of the run's lock."""
    for entry in root.iterdir() if root.is_dir() else ():
        if entry.name.startswith((".tmp-", ".trash-")):
            shutil.rmtree(entry)
