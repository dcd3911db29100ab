"""Signals become one flag, which the ranks agree on in the step's own collective (loop.py)."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from types import FrameType

# Whoever stops a whole process group reaches a rank two or three times: directly, through the launcher and torchrun.
ONE_WISH_S = 5.0
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopFlag:
    """Set by SIGTERM, SIGUSR1 or SIGINT. One more, seconds later, ends the process; the newest checkpoint is whole."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._set_at = 0.0

    def install(self) -> None:
        for number in _SIGNALS:
            signal.signal(number, self._on_signal)

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Within it; then what was there before."""
        before = {number: signal.getsignal(number) for number in _SIGNALS}
        self.install()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def __bool__(self) -> bool:
        return self.signal_name is not None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.signal_name is None:
            self.signal_name = signal.Signals(number).name
            self._set_at = time.monotonic()
        elif time.monotonic() - self._set_at > ONE_WISH_S:
            os._exit(128 + number)
