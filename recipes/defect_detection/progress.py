"""How far a preparation is: a bar on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

_SAY_EVERY_S = 20.0
_SHOW_AFTER_S = 1.0


class Progress:
    """Counts towards a total; what is done within a second is not told while it goes on."""

    def __init__(self, say: Callable[[str], None], what: str, total: int) -> None:
        self._say, self._what, self._total = say, what, total
        self._done = 0
        self._began = self._said = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        return self

    def advance(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if self._bar is None and sys.stderr.isatty() and now - self._began > _SHOW_AFTER_S:
            self._start_bar()
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done)
        elif now - self._said > _SAY_EVERY_S:
            self._said = now
            rate = self._done / (now - self._began)
            left = (self._total - self._done) / rate
            self._say(
                f"data           {self._what}: {self._done:,} of {self._total:,}, {rate:.0f}/s, about {left:.0f} s left"
            )

    def _start_bar(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (TextColumn("data           {task.description}"), BarColumn(), MofNCompleteColumn())
        self._bar = Bar(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
        self._task = self._bar.add_task(self._what, total=self._total)
        self._bar.start()

    def __exit__(self, kind: object, *raised: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        took = time.monotonic() - self._began
        if kind is None:
            self._say(f"data           {self._what}: {self._done:,} in {took:.1f} s")
