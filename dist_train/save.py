"""Saving while training goes on: copy, write in the background, commit once every rank has written.

The ranks learn in the step's own collective who has written and who has failed, so that all do the same.
"""

from __future__ import annotations

import errno
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_train import checkpoint_files as files
from dist_train.checkpoint import pieces_of
from dist_train.engine import Engine
from dist_train.errors import StorageError
from dist_train.held import Held
from dist_train.rundir import storage_error


@dataclass
class _Pending:
    """A save under way."""

    step: int
    meta: dict[str, Any]
    temporary: Path
    final: Path
    shard: dict[str, Any] = field(default_factory=dict)
    error: OSError | None = None
    thread: threading.Thread | None = None
    collected: bool = False


class Saver:
    """Writes the checkpoints of one run, one at a time. Its methods are called on all ranks alike."""

    def __init__(self, root: Path, engine: Engine, asynchronous: bool, committed: Callable[[int, str], None]) -> None:
        """committed(step, folder name): called on rank 0 once a checkpoint exists, perhaps from another thread."""
        self._root = root
        self._engine = engine
        self._asynchronous = asynchronous
        self._committed = committed
        self._pending: _Pending | None = None
        self._copies: dict[str, Tensor] = {}

    def start(self, held: list[Held], step: int, meta: dict[str, Any]) -> None:
        """Save `held` as the checkpoint of `step`, with `meta` in its manifest. Returns when the state may change.

        StorageError on all ranks if one could not write this or, in the background, an earlier one.
        """
        self.finish()
        final = files.step_folder(self._root, step)
        pending = _Pending(step, meta, self._root / f".tmp-{final.name}", final)
        pieces = pieces_of(held, self._engine.rank, self._engine.world_size)
        self._pending = pending
        if self._asynchronous:
            pieces = [(piece, self._copied(piece.key, flat)) for piece, flat in pieces]
            if self._engine.device.type == "cuda":
                torch.cuda.current_stream().synchronize()
        self._run(lambda: self._write(pending, pieces))
        if not self._asynchronous:
            self.finish()

    def wishes(self) -> tuple[bool, bool]:
        """(this rank has written and nobody has collected it, this rank has failed), for the step's collective."""
        pending = self._pending
        if pending is None or (pending.thread is not None and pending.thread.is_alive()):
            return False, False
        return not pending.collected and pending.error is None, pending.error is not None

    def heard(self, written: float, failed: float) -> None:
        """What `wishes` came to over all ranks."""
        pending = self._pending
        if failed > 0:
            self.finish()
        elif pending is not None and not pending.collected and round(written) == self._engine.world_size:
            self._collect(pending)

    def finish(self) -> None:
        """Wait until the save under way is committed. StorageError on all ranks if it could not be."""
        pending = self._pending
        if pending is None:
            return
        self._join(pending)
        if not pending.collected:
            self._collect(pending)
            self._join(pending)
        self._pending = None

    def _collect(self, pending: _Pending) -> None:
        """All ranks have written: rank 0 commits, in the background."""
        shards = self._engine.gather_objects(pending.shard)
        pending.collected = True
        if self._engine.rank == 0:
            self._run(lambda: self._commit(pending, shards))

    def _join(self, pending: _Pending) -> None:
        """Wait for this rank's thread; if one rank failed, all raise: a rank that went on alone would wait for ever."""
        if pending.thread is not None:
            pending.thread.join()
        error = pending.error
        errors = self._engine.gather_objects(None if error is None else (error.errno, error.strerror))
        first = next((entry for entry in errors if entry is not None), None)
        if first is not None:
            self._pending = None
            raise storage_error(pending.final, OSError(*first))

    def _run(self, action: Callable[[], None]) -> None:
        pending = self._pending
        assert pending is not None

        def attempt() -> None:
            try:
                action()
            except OSError as error:
                pending.error = error
            except StorageError as error:  # of the event that tells of the commit
                pending.error = error.__cause__ if isinstance(error.__cause__, OSError) else OSError(str(error))
            except BaseException as error:
                traceback.print_exc()
                pending.error = OSError(errno.EIO, f"{type(error).__name__}: {error}")

        pending.thread = threading.Thread(target=attempt, name="checkpoint", daemon=True)
        pending.thread.start()

    def _write(self, pending: _Pending, pieces: list[tuple[files.Piece, Tensor]]) -> None:
        self._root.mkdir(exist_ok=True)
        pending.temporary.mkdir(exist_ok=True)
        name = f"rank-{self._engine.rank:05d}-of-{self._engine.world_size:05d}.safetensors"
        data = [(piece, flat.detach().cpu().contiguous().view(torch.uint8).numpy().data) for piece, flat in pieces]
        pending.shard = files.write_shard(pending.temporary / name, data)

    def _commit(self, pending: _Pending, shards: list[dict[str, Any]]) -> None:
        payload = {"step": pending.step, "world_size": self._engine.world_size, **pending.meta}
        files.write_manifest(pending.temporary, {**payload, "shards": shards})
        files.commit(pending.temporary, pending.final)
        self._committed(pending.step, pending.final.name)

    def _copied(self, key: str, flat: Tensor) -> Tensor:
        """A copy in host memory that is used again by the next save."""
        copy = self._copies.get(key)
        if copy is None or copy.numel() != flat.numel():
            copy = torch.empty(flat.numel(), dtype=flat.dtype, pin_memory=flat.is_cuda)
            self._copies[key] = copy
        return copy.copy_(flat, non_blocking=True)
