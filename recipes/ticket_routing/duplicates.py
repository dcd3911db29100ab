"""Near-duplicate tickets: token-set Jaccard of at least .9, found by MinHash, checked, grouped transitively."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterator, Sequence

import numpy as np

THRESHOLD = 0.9
# 16 bands of 8: a pair at the threshold is missed with a chance of 1e-4 (Broder 1997; Leskovec et al., MMDS, ch. 3).
_BANDS, _ROWS = 16, 8
_CHUNK_TOKENS = 4_000_000
_WORD = re.compile(r"\w+")


def normalise(text: str) -> str:
    """Unicode compatibility form, case folded, words alone with one space between."""
    return " ".join(_WORD.findall(unicodedata.normalize("NFKC", text).casefold()))


def group_near_duplicates(texts: Sequence[str]) -> np.ndarray:
    """For each text the index of its group's first text: [n] int64. A text without words is alone."""
    words = [frozenset(normalise(text).split()) for text in texts]
    parent = np.arange(len(texts), dtype=np.int64)
    first_of: dict[frozenset[str], int] = {}
    for index, tokens in enumerate(words):
        if tokens:
            # Equal sets meet here, so that no bucket below is crowded by copies.
            parent[index] = first_of.setdefault(tokens, index)
    distinct = np.fromiter(first_of.values(), dtype=np.int64, count=len(first_of))
    for bucket in _buckets([words[index] for index in distinct]):
        _unite_bucket(parent, words, distinct[bucket].tolist())
    return np.array([_root(parent, index) for index in range(len(texts))], dtype=np.int64)


def _unite_bucket(parent: np.ndarray, words: list[frozenset[str]], bucket: list[int]) -> None:
    """Unite the groups that have a near pair in the bucket. Pairs within a group need no look, so that thousands of
    tickets from one template cost a comparison each, not one for every pair."""
    groups: dict[int, list[int]] = {}
    for index in bucket:
        own = [index]
        for root in list(groups):
            if _root(parent, index) == root or any(_near(words[index], words[other]) for other in groups[root]):
                _unite(parent, index, root)
                own += groups.pop(root)
        groups[_root(parent, index)] = own


def _near(first: frozenset[str], second: frozenset[str]) -> bool:
    common = len(first & second)
    return common >= THRESHOLD * (len(first) + len(second) - common)


def _unite(parent: np.ndarray, first: int, second: int) -> None:
    a, b = _root(parent, first), _root(parent, second)
    parent[max(a, b)] = min(a, b)


def _root(parent: np.ndarray, index: int) -> int:
    while parent[index] != index:
        parent[index] = parent[parent[index]]
        index = int(parent[index])
    return index


def _buckets(sets: list[frozenset[str]]) -> Iterator[list[int]]:
    """Sets that share a band of their signatures, in rising order."""
    signatures = _signatures(sets)
    for band in range(_BANDS):
        rows = np.ascontiguousarray(signatures[:, band * _ROWS : (band + 1) * _ROWS])
        keys = rows.view(f"V{rows.itemsize * _ROWS}").ravel()
        _, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
        order = np.argsort(inverse, kind="stable")
        ends = np.cumsum(counts)
        for end, count in zip(ends[counts > 1], counts[counts > 1], strict=True):
            yield np.sort(order[end - count : end]).tolist()


def _signatures(sets: list[frozenset[str]]) -> np.ndarray:
    """MinHash signatures [n, bands * rows] uint32."""
    vocabulary: dict[str, int] = {}
    flat = [vocabulary.setdefault(word, len(vocabulary)) for words in sets for word in words]
    hashed = np.fromiter(
        (int.from_bytes(hashlib.blake2b(word.encode(), digest_size=4).digest(), "little") for word in vocabulary),
        dtype=np.uint64,
        count=len(vocabulary),
    )
    generator = np.random.Generator(np.random.Philox(key=20_260_101))
    permutations = _BANDS * _ROWS
    multiply = generator.integers(1, 2**61, permutations, dtype=np.uint64) | np.uint64(1)
    add = generator.integers(0, 2**61, permutations, dtype=np.uint64)
    # One table of word x permutation, since few words make up many tickets.
    table = ((hashed[:, None] * multiply + add) >> np.uint64(32)).astype(np.uint32)
    sizes = np.fromiter((len(words) for words in sets), dtype=np.int64, count=len(sets))
    words_of = np.asarray(flat, dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    result = np.empty((len(sets), permutations), dtype=np.uint32)
    first = 0
    while first < len(sets):
        # As many sets as fit a bounded table of rows.
        last = max(first + 1, int(np.searchsorted(starts, starts[first] + _CHUNK_TOKENS // permutations, "right")) - 1)
        part = table[words_of[starts[first] : starts[last]]]
        result[first:last] = np.minimum.reduceat(part, starts[first:last] - starts[first], axis=0)
        first = last
    return result
