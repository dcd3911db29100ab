"""Groups of near-duplicates: pairs that share a band, checked word by word, united transitively.

Works block by block of BLOCK_ROWS rows, each compared with itself and all before it. So what a row was grouped with
when its block was complete does not depend on rows that came later. Holds some 30 bytes a row; buckets lie on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from recipes.ticket_routing.duplicates import BANDS, may_be_near, near

BLOCK_ROWS = 200_000
# Tickets from one template fill a bucket without being near, and pairs grow with its square. Behind this many a row of
# a later block must agree in two bands, in three where that is as crowded: a pair at the threshold is then missed with
# a chance of .2 or 1 %. Within the first block every pair of a bucket is looked at.
_CROWDED = 500
_MOST_SHARED = 3
_PAIRS = 250_000
# Buckets with fewer earlier rows than this are not worth a look at their groups.
_FEW = 32
_KEPT_WORDS = 20_000
_ROW = np.uint64(0xFFFFFFFF)


@dataclass(frozen=True)
class Grouped:
    """Rows by group, each named after its first row: [n] uint32."""

    groups: np.ndarray
    then: np.ndarray
    """The group of each row when its block was complete."""


@dataclass(frozen=True)
class _Buckets:
    """One way to put rows into buckets. Row later[k] is to be compared with order[end[k] - count[k] : end[k]]."""

    order: np.ndarray
    later: np.ndarray
    end: np.ndarray
    count: np.ndarray


def group(
    sets: np.ndarray,
    sketches: np.ndarray,
    sizes: np.ndarray,
    band: Callable[[int], np.ndarray],
    words: Callable[[int], frozenset[str]],
    folder: Path,
) -> Grouped:
    """sets, sketches, sizes: of the rows' signatures. band(b): [n] keys. words(row): its words, to check a pair.

    A row without words is alone. folder: for the buckets, which may go when the groups are there.
    """
    parent = _unite_equal(sets, sizes)
    then = np.empty_like(parent)
    rows = np.flatnonzero((parent == np.arange(len(parent), dtype=np.uint32)) & (sizes > 0)).astype(np.uint32)
    buckets = [_stored(folder / f"{index}", found) for index, found in enumerate(_all_buckets(rows, band))]
    known = _Words(words)
    for start in range(0, len(parent), BLOCK_ROWS):
        stop = min(start + BLOCK_ROWS, len(parent))
        for found in buckets:
            for first, second in _pairs(found, parent, start, stop):
                may = may_be_near((sketches[first], sketches[second]), (sizes[first], sizes[second]))
                _unite_near(parent, first[may], second[may], known)
        block = np.arange(start, stop)
        then[start:stop] = parent[start:stop] = _roots(parent, block)
    return Grouped(_roots(parent, np.arange(len(parent))), then)


def _unite_equal(sets: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Each row's parent: the first row with the same set of words. So no bucket is crowded by copies."""
    order = np.argsort(sets, kind="stable").astype(np.uint32)
    ordered = sets[order]
    new = np.ones(len(order), dtype=bool)
    new[1:] = (ordered[1:] != ordered[:-1]) | (sizes[order[1:]] == 0)
    del ordered
    starts = np.flatnonzero(new)
    parent = np.empty(len(order), dtype=np.uint32)
    parent[order] = np.repeat(order[starts], np.diff(starts, append=len(order)))
    return parent


def _all_buckets(rows: np.ndarray, band: Callable[[int], np.ndarray]) -> Iterator[_Buckets]:
    for first in range(BANDS):
        buckets, crowd, looking = _bucket(band(first)[rows].astype(np.uint64), rows, None, 1)
        yield buckets
        if looking.any():
            more = {index: band(index)[rows[crowd[0]]] for index in range(first + 1, BANDS)}
            yield from _within(crowd[1], rows[crowd[0]], looking, more, 2)


def _within(
    bucket: np.ndarray, rows: np.ndarray, looking: np.ndarray, more: dict[int, np.ndarray], shared: int
) -> Iterator[_Buckets]:
    """Buckets within crowded ones: of rows that agree in one more band. looking: the rows that still need partners."""
    for index, keys in more.items():
        _, names = np.unique((bucket.astype(np.uint64) << np.uint64(32)) | keys, return_inverse=True)
        buckets, crowd, still = _bucket(names.astype(np.uint64), rows, looking, shared)
        yield buckets
        if still.any():
            rest = {later: more[later][crowd[0]] for later in more if later > index}
            yield from _within(crowd[1], rows[crowd[0]], still, rest, shared + 1)


def _bucket(
    keys: np.ndarray, rows: np.ndarray, looking: np.ndarray | None, shared: int
) -> tuple[_Buckets, tuple[np.ndarray, np.ndarray], np.ndarray]:
    """Buckets of equal keys, what is in the crowded ones (places in `rows`, bucket), and which of those still look.

    keys: [n] uint64 below 2**32, overwritten. rows: [n], rising.
    """
    keys <<= np.uint64(32)
    keys |= np.arange(len(rows), dtype=np.uint32)
    keys.sort()
    new = np.ones(len(keys) + 1, dtype=bool)
    new[1:-1] = (keys[1:] ^ keys[:-1]) > _ROW
    shown = ~(new[:-1] & new[1:])
    place = (keys[shown] & _ROW).astype(np.uint32)
    starts = np.flatnonzero(new[:-1][shown])
    sizes = np.diff(starts, append=len(place))
    bucket = np.repeat(np.arange(len(sizes), dtype=np.uint32), sizes)
    before = np.arange(len(place), dtype=np.uint32) - np.repeat(np.cumsum(sizes) - sizes, sizes).astype(np.uint32)
    order = rows[place]
    looks = before > 0 if looking is None else (before > 0) & looking[place]
    crowded = np.zeros(len(place), dtype=bool)
    if shared < _MOST_SHARED:
        crowded = looks & (before >= _CROWDED) & (order >= BLOCK_ROWS)
    found = np.flatnonzero(looks & ~crowded).astype(np.uint32)
    found = found[np.argsort(order[found], kind="stable")]
    count = before[found]
    if shared == _MOST_SHARED:
        count = np.minimum(count, _CROWDED)
    buckets = _Buckets(order, order[found], found, count)
    full = np.zeros(len(sizes), dtype=bool)
    full[bucket[crowded]] = True
    inside = full[bucket]
    # Rising rows again, for the next level.
    inside_place, inside_bucket, still = place[inside], bucket[inside], crowded[inside]
    rising = np.argsort(inside_place, kind="stable")
    return buckets, (inside_place[rising], inside_bucket[rising]), still[rising]


def _stored(stem: Path, buckets: _Buckets) -> _Buckets:
    """The same over memory maps, where it is large."""
    if len(buckets.order) < BLOCK_ROWS:
        return buckets
    stem.mkdir(parents=True)
    arrays = []
    for name, values in vars(buckets).items():
        np.save(stem / f"{name}.npy", values)
        arrays.append(np.load(stem / f"{name}.npy", mmap_mode="r"))
    return _Buckets(*arrays)


Pairs = tuple[np.ndarray, np.ndarray]
"""(earlier row, later row) of each pair, rising in the later one."""


def _pairs(buckets: _Buckets, parent: np.ndarray, start: int, stop: int) -> Iterator[Pairs]:
    """The pairs to look at whose later row lies in start..stop. Those yielded are to be united before the next."""
    first, last = np.searchsorted(buckets.later, [start, stop])
    later, end, count = (np.asarray(part[first:last]) for part in (buckets.later, buckets.end, buckets.count))
    few = count < _FEW
    yield from _expand(buckets.order, later[few], end[few] - count[few], count[few])
    later, end, count = later[~few], end[~few], count[~few]
    if len(later):
        yield buckets.order[end - np.uint32(1)], later
        yield from _across(buckets.order, later, end.astype(np.int64), count.astype(np.int64), parent)


def _across(
    order: np.ndarray, later: np.ndarray, end: np.ndarray, count: np.ndarray, parent: np.ndarray
) -> Iterator[Pairs]:
    """Pairs in large buckets, without those within the group that most of a bucket belongs to: thousands of near
    tickets from one template would make millions of pairs that say nothing new."""
    begin = end - count
    rising = np.lexsort((end, begin))
    reach = np.maximum.accumulate(end[rising])
    # Where no interval before reaches, a stretch of one bucket begins.
    fresh = np.ones(len(rising), dtype=bool)
    fresh[1:] = begin[rising][1:] >= reach[:-1]
    stretch = np.empty(len(rising), dtype=np.int64)
    stretch[rising] = np.cumsum(fresh) - 1
    starts = begin[rising][fresh]
    sizes = np.append(reach[:-1][fresh[1:]], reach[-1:]) - starts
    offsets = np.cumsum(sizes) - sizes
    members = order[_ranges(starts, sizes)]
    roots, of = _roots(parent, members), np.repeat(np.arange(len(starts)), sizes)
    pairs, counts = np.unique((of << 32) | roots, return_counts=True)
    largest = np.lexsort((counts, pairs >> 32))[np.searchsorted(pairs >> 32, np.arange(len(starts)), "right") - 1]
    main = pairs[largest] & 0xFFFFFFFF
    others = roots != main[of]
    before = np.concatenate([[0], np.cumsum(others)])
    low = begin - starts[stretch] + offsets[stretch]
    inside = _roots(parent, later) == main[stretch]
    yield from _expand(members[others], later[inside], before[low[inside]], (before[low + count] - before[low])[inside])
    yield from _expand(members, later[~inside], low[~inside], count[~inside])


def _expand(order: np.ndarray, later: np.ndarray, begin: np.ndarray, count: np.ndarray) -> Iterator[Pairs]:
    """Each row of `later` with order[begin : begin + count], in pieces of bounded size."""
    total = np.cumsum(count, dtype=np.int64)
    first = 0
    while first < len(later):
        done = total[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(total, done + _PAIRS, "right")))
        counts = count[first:last].astype(np.int64)
        yield order[_ranges(begin[first:last].astype(np.int64), counts)], np.repeat(later[first:last], counts)
        first = last


def _ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """start .. start + count of each, one behind the other."""
    return np.arange(counts.sum()) + np.repeat(starts - (np.cumsum(counts) - counts), counts)


def _unite_near(parent: np.ndarray, first: np.ndarray, second: np.ndarray, words: _Words) -> None:
    """Unite the groups of the pairs that are near. Pairs within a group need no look."""
    while len(first):
        apart = _roots(parent, first) != _roots(parent, second)
        first, second = first[apart], second[apart]
        # One pair for each later row at a time: what it unites makes most others needless.
        tried = np.ones(len(second), dtype=bool)
        tried[1:] = second[1:] != second[:-1]
        for a, b in zip(first[tried].tolist(), second[tried].tolist(), strict=True):
            if _root(parent, a) != _root(parent, b) and near(words[a], words[b]):
                _unite(parent, a, b)
        first, second = first[~tried], second[~tried]


class _Words:
    """The words of rows, the last ones kept."""

    def __init__(self, read: Callable[[int], frozenset[str]]) -> None:
        self._read = read
        self._kept: dict[int, frozenset[str]] = {}

    def __getitem__(self, row: int) -> frozenset[str]:
        if row not in self._kept:
            if len(self._kept) >= _KEPT_WORDS:
                self._kept.clear()
            self._kept[row] = self._read(row)
        return self._kept[row]


def _roots(parent: np.ndarray, rows: np.ndarray) -> np.ndarray:
    roots = parent[rows]
    while True:
        above = parent[roots]
        if np.array_equal(above, roots):
            return roots
        roots = above


def _unite(parent: np.ndarray, first: int, second: int) -> None:
    a, b = _root(parent, first), _root(parent, second)
    parent[max(a, b)] = min(a, b)


def _root(parent: np.ndarray, row: int) -> int:
    while parent[row] != row:
        parent[row] = parent[parent[row]]
        row = int(parent[row])
    return row
