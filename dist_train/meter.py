"""Throughput and memory of the running training."""

from __future__ import annotations

import time

import torch


class Meter:
    """Counts between two log lines."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._start = time.perf_counter()
        self._samples = self._useful = self._padded = 0
        self._waited = 0.0

    def add(self, samples: int, useful: int, padded: int) -> None:
        """One step's samples, and its positions (tokens, pixels) without and with padding, over all ranks."""
        self._samples += samples
        self._useful += useful
        self._padded += padded

    def waited(self, seconds: float) -> None:
        """So long the training waited for its next batch."""
        self._waited += seconds

    def read(self) -> dict[str, float]:
        """Rates since the last reading, over all ranks, and this process's memory."""
        seconds = time.perf_counter() - self._start
        rates = {
            "samples_per_s": self._samples / seconds,
            "tokens_per_s": self._useful / seconds,
            "padding_share": 1.0 - self._useful / self._padded if self._padded else 0.0,
            "input_wait_share": self._waited / seconds,
            "memory_gib": self._memory_bytes() / 2**30,
        }
        self._reset()
        return rates

    def pause(self) -> float:
        """The time at which something that is no training begins; hand it to `resume`."""
        return time.perf_counter()

    def resume(self, since: float) -> None:
        """Take the time since `pause` out of the rates."""
        self._start += time.perf_counter() - since

    def _memory_bytes(self) -> int:
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
        # Not RSS: pages of the memory-mapped data count there, and they are the page cache's.
        with open("/proc/self/status", encoding="ascii") as status:
            anonymous = next(line for line in status if line.startswith("RssAnon:"))
        return 1024 * int(anonymous.split()[1])
