"""Output that cannot be written any more (a closed terminal, a pipe that nobody reads, a full disk) stops nothing."""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Any, TextIO


class _Steady(io.RawIOBase):
    """Writes to a descriptor until that fails, and to nowhere from then on."""

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return self._descriptor is not None and os.isatty(self._descriptor)

    def fileno(self) -> int:
        if self._descriptor is None:
            raise io.UnsupportedOperation("this output was lost")
        return self._descriptor

    def write(self, data: Any) -> int:
        if self._descriptor is None:
            return len(data)
        try:
            return os.write(self._descriptor, data)
        except OSError as error:
            lost, self._descriptor = self._descriptor, None
            # A reader that has gone has seen enough. Of anything else the error output may still tell.
            if error.errno != errno.EPIPE and lost == 1:
                print(f"no more output can be written ({error.strerror}); going on without.", file=sys.stderr)
            return len(data)


def make_output_steady() -> None:
    """From now on printing raises no error."""
    sys.stderr = _steady(sys.stderr)
    sys.stdout = _steady(sys.stdout)


def _steady(stream: TextIO | None) -> TextIO:
    """stream: None where the process was started without it."""
    raw = io.BufferedWriter(_Steady(None if stream is None else stream.fileno()))
    encoding = "utf-8" if stream is None else stream.encoding
    return io.TextIOWrapper(raw, encoding=encoding, errors="replace", line_buffering=True)
