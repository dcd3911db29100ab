"""Each rank says once a second that it lives and how far it is, so that a wait without end can name who is missing."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Collection
from pathlib import Path

from dist_train.errors import HangError
from dist_train.rundir import RunDir

_EVERY_S = 1.0
# A rank that was silent for so long is stopped or gone, not slow.
_SILENT_S = 5.0


class Heartbeat:
    """Beats from a thread: the loop only sets `step`."""

    def __init__(self, run: RunDir, rank: int) -> None:
        self.step = 0
        run.heartbeats.mkdir(exist_ok=True)
        self._file = os.open(run.heartbeats / f"rank{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def _beat(self) -> None:
        while True:
            os.pwrite(self._file, f"{self.step:12d} {time.time():18.3f}\n".encode(), 0)
            time.sleep(_EVERY_S)


def waited_in_vain(run: RunDir, rank: int, waited: Collection[int] = ()) -> HangError:
    """The error for a collective that ran out of time on `rank`; it names who is missing.

    waited: ranks that are known to have waited too, and may have died of it.
    """
    plan = json.loads(run.plan.read_text())
    missing = ", ".join(missing_ranks(run.heartbeats, plan["world_size"], waited)) or "no rank stands out"
    return HangError(
        f"rank {rank} waited in vain for the other ranks (parallel.timeout_s). Missing: {missing}.\n"
        f"Logs of all ranks: {run.logs}. Go on from the newest checkpoint with: dist-train resume {run.path}"
    )


def missing_ranks(folder: Path, world_size: int, waited: Collection[int] = ()) -> list[str]:
    """The ranks that the others wait for, each with what is known of it; empty when all look alike.

    Those in `waited` are among the others.
    """
    beats: dict[int, tuple[int, float]] = {}
    for rank in range(world_size):
        try:
            step, when = (folder / f"rank{rank}").read_text().split()
            beats[rank] = int(step), float(when)
        except (OSError, ValueError):
            beats[rank] = -1, 0.0
    now = time.time()
    silent = [rank for rank, (_, when) in beats.items() if now - when > _SILENT_S and rank not in waited]
    if silent:
        return [f"rank {rank} (silent since step {beats[rank][0]})" for rank in silent]
    lowest, highest = min(step for step, _ in beats.values()), max(step for step, _ in beats.values())
    if lowest == highest:
        return []
    return [
        f"rank {rank} (still in step {step})"
        for rank, (step, _) in beats.items()
        if step == lowest and rank not in waited
    ]
