"""Which samples each step trains, on which rank and in which micro-batch: pure functions of (seed, epoch, step).

No state is kept: a position is a step number, and skipping ahead costs nothing. Needs numpy alone.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np

T = TypeVar("T")

# Domains of derive_seed: two uses of one seed must not share random numbers.
ORDER, AUGMENT, DROPOUT, INIT = range(4)

_FEISTEL_ROUNDS = 8
_WORD = (1 << 64) - 1
_BLOCK = 8192  # positions computed at once: numpy's cost a call is then shared by many steps


def mix64(value: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer (Steele, Lea, Flood 2014) on uint64 values, elementwise."""
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def derive_seed(domain: int, *parts: int) -> int:
    """A 63-bit seed that depends on the domain and on every part, in order."""
    state = _mix(domain)
    for part in parts:
        state = _mix(state ^ _mix(part))
    return state >> 1


def _mix(value: int) -> int:
    """mix64 of one number: Python's own are faster than an array of one, and a step takes several."""
    value = (value + 0x9E3779B97F4A7C15) & _WORD
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _WORD
    return value ^ (value >> 31)


def row_seeds(seed: int, epoch: int, ids: np.ndarray) -> np.ndarray:
    """One uint64 seed for each row id, the same for any number of ranks and workers."""
    return mix64(mix64(ids.astype(np.uint64)) ^ _augment_key(seed, epoch))


@lru_cache(maxsize=4)
def _augment_key(seed: int, epoch: int) -> np.uint64:
    return np.uint64(derive_seed(AUGMENT, seed, epoch))


def epoch_order(seed: int, epoch: int, num_rows: int, start: int, stop: int) -> np.ndarray:
    """Positions [start, stop) of the epoch's random order of the rows 0 … num_rows-1, as int64."""
    blocks = range(start // _BLOCK, -(-stop // _BLOCK))
    order = np.concatenate([_order_block(seed, epoch, num_rows, block) for block in blocks])
    return order[start - blocks.start * _BLOCK : stop - blocks.start * _BLOCK]


@lru_cache(maxsize=4)
def _order_block(seed: int, epoch: int, num_rows: int, block: int) -> np.ndarray:
    """One block of the order.

    A Feistel network permutes the next power of four; values outside the rows walk on until they fall inside
    (cycle walking, Black and Rogaway 2002). So any part of the order is computed alone, without a table.
    """
    half = np.uint64(max(1, -(-max(1, num_rows - 1).bit_length() // 2)))
    mask = np.uint64((1 << int(half)) - 1)
    keys = [np.uint64(derive_seed(ORDER, seed, epoch, round_)) for round_ in range(_FEISTEL_ROUNDS)]
    values = np.arange(block * _BLOCK, min((block + 1) * _BLOCK, num_rows), dtype=np.uint64)
    outside = np.ones(len(values), dtype=bool)
    while outside.any():
        walking = values[outside]
        left, right = walking >> half, walking & mask
        for key in keys:
            left, right = right, left ^ (mix64(right ^ key) & mask)
        values[outside] = (left << half) | right
        outside = values >= np.uint64(num_rows)
    return values.astype(np.int64)


@dataclass(frozen=True)
class Schedule:
    """Where each step lies in the epochs. The last batch of an epoch is short, never padded with repeats."""

    num_rows: int
    global_batch_size: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_rows // self.global_batch_size)

    def epoch_of(self, step: int) -> int:
        """The epoch (from 0) of optimizer step `step` (from 0)."""
        return step // self.steps_per_epoch

    def samples_before(self, step: int) -> int:
        """Samples trained by steps 0 … step-1."""
        epochs, within = divmod(step, self.steps_per_epoch)
        return epochs * self.num_rows + min(within * self.global_batch_size, self.num_rows)

    def rows_of(self, step: int) -> np.ndarray:
        """Indices of the rows that step `step` trains."""
        epoch, within = divmod(step, self.steps_per_epoch)
        start = within * self.global_batch_size
        return epoch_order(self.seed, epoch, self.num_rows, start, min(start + self.global_batch_size, self.num_rows))


def num_micro_batches(num_samples: int, world_size: int, micro_batch_size: int) -> int:
    """Fewest micro-batches of each rank for one step, the same on all ranks."""
    per_rank = -(-num_samples // world_size)
    return -(-per_rank // micro_batch_size)


def partition(lengths: np.ndarray, world_size: int, micro_batches: int, cap: int) -> list[list[np.ndarray]]:
    """Split one global batch over ranks and micro-batches: result[rank][micro_batch] = positions in `lengths`.

    Sorted by length and cut into world_size * micro_batches runs of at most `cap` rows, of which the largest padded
    size (rows * longest) is as small as can be: little padding, and no rank waits for another. Every rank gets
    `micro_batches` of them; with fewer samples than runs some are empty.
    """
    order = np.argsort(-lengths, kind="stable")
    cuts = _balanced_cuts(lengths[order].tolist(), world_size * micro_batches, cap)
    result: list[list[np.ndarray]] = [[] for _ in range(world_size)]
    for index in range(micro_batches):
        # Alternate who gets the longer rows, so that the small differences that are left cancel out.
        ranks = range(world_size) if index % 2 == 0 else range(world_size - 1, -1, -1)
        for rank, cut in zip(ranks, cuts[index * world_size : (index + 1) * world_size], strict=True):
            result[rank].append(order[slice(*cut)])
    return result


def _balanced_cuts(lengths: list[int], parts: int, cap: int) -> list[tuple[int, int]]:
    """Cut descending `lengths` into `parts` runs of at most `cap`, the largest count * longest being smallest."""
    if parts == 1 and len(lengths) <= cap:
        return [(0, len(lengths))]
    low, high = max(1, lengths[0]), max(1, lengths[0]) * cap
    best = _cuts_within(lengths, parts, cap, high)
    while low < high:
        limit = (low + high) // 2
        cuts = _cuts_within(lengths, parts, cap, limit)
        if cuts is None:
            low = limit + 1
        else:
            high, best = limit, cuts
    assert best is not None, f"{len(lengths)} rows do not fit into {parts} runs of {cap}"
    return best


def _cuts_within(lengths: list[int], parts: int, cap: int, limit: int) -> list[tuple[int, int]] | None:
    """The cuts when no run's count * longest is above `limit`; None when the rows do not fit so."""
    cuts, start, total = [], 0, len(lengths)
    for part in range(parts):
        fits = min(cap, limit // max(1, lengths[start])) if start < total else 0
        # Leave a row for each run that follows, as long as there are enough.
        stop = min(start + fits, max(total - (parts - part - 1), min(start + 1, total)))
        cuts.append((start, stop))
        start = stop
    return cuts if start == total else None


def padding_share(lengths: np.ndarray, parts: list[list[np.ndarray]]) -> float:
    """Share of padded positions when each micro-batch is padded to its longest row."""
    padded = sum(len(rows) * int(lengths[rows].max()) for rank in parts for rows in rank if len(rows))
    return 1.0 - float(lengths.sum()) / padded if padded else 0.0


def prefetch(make: Callable[[int], T], start: int, stop: int, depth: int = 2) -> Iterator[T]:
    """make(start) … make(stop-1) in order, up to `depth` ahead in a thread. An error is raised where it was due."""
    results: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(depth)
    closed = threading.Event()

    def produce() -> None:
        for index in range(start, stop):
            try:
                item: tuple[T | None, BaseException | None] = (make(index), None)
            except BaseException as error:
                item = (None, error)
            while not closed.is_set():
                try:
                    results.put(item, timeout=0.2)
                    break
                except queue.Full:
                    continue
            if closed.is_set() or item[1] is not None:
                return

    thread = threading.Thread(target=produce, name="prefetch", daemon=True)
    thread.start()
    try:
        for _ in range(start, stop):
            value, error = results.get()
            if error is not None:
                raise error
            yield value  # type: ignore[misc]
    finally:
        closed.set()
        thread.join()
