"""Signals become one flag, which the ranks agree on in the step's own collective (loop.py)."""

from __future__ import annotations

import os
import signal
from types import FrameType


class StopFlag:
    """Set by SIGTERM, SIGUSR1 or SIGINT. A second one ends the process at once; the newest checkpoint stays whole."""

    def __init__(self) -> None:
        self.signal_name: str | None = None

    def install(self) -> None:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def __bool__(self) -> bool:
        return self.signal_name is not None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.signal_name is not None:
            os._exit(128 + number)
        self.signal_name = signal.Signals(number).name
