"""What near-duplicate tickets are, and the signatures that find them: MinHash bands, and a sketch of the words."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

THRESHOLD = 0.9
# 16 bands of 8: a pair at the threshold is missed with a chance of 1e-4 (Broder 1997; Leskovec et al., MMDS, ch. 3).
BANDS, _ROWS = 16, 8
_PERMUTATIONS = BANDS * _ROWS
# Texts whose words share one table of words x permutations, and numbers in a piece of work: both bound the memory.
_TABLE_TEXTS = 5_000
_CHUNK_TOKENS = 4_000_000
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Signatures:
    """Of n texts."""

    bands: np.ndarray
    """[BANDS, n] uint32: two near-duplicates most likely agree in one."""
    sets: np.ndarray
    """[n] uint64: the hash of the set of words."""
    sketches: np.ndarray
    """[n] uint64: each word flips one bit, so two sketches differ in at most as many bits as the sets in words."""
    sizes: np.ndarray
    """[n] uint32: different words."""
    texts: np.ndarray
    """[n] uint64: the hash of the normalised text, or of the signs of a text without words."""


def normalise(text: str) -> str:
    """Unicode compatibility form, case folded, words alone with one space between."""
    return " ".join(_WORD.findall(unicodedata.normalize("NFKC", text).casefold()))


def words_of(text: str) -> frozenset[str]:
    return frozenset(normalise(text).split())


def near(first: frozenset[str], second: frozenset[str]) -> bool:
    """Token-set Jaccard of at least THRESHOLD."""
    common = len(first & second)
    return common >= THRESHOLD * (len(first) + len(second) - common)


def may_be_near(sketches: tuple[np.ndarray, np.ndarray], sizes: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Whether pairs of sets can be near at all. Never wrong about one that is.

    Sets of sizes a and b that differ in d words have the Jaccard (a + b - d) / (a + b + d): .9 means d <= (a + b) / 19.
    """
    differing = np.bitwise_count(sketches[0] ^ sketches[1])
    return differing * np.uint32(19) <= sizes[0] + sizes[1]


def sign(texts: Sequence[str]) -> Signatures:
    parts = [_sign_part(texts[start : start + _TABLE_TEXTS]) for start in range(0, len(texts), _TABLE_TEXTS)]
    parts = parts or [_sign_part([])]
    return Signatures(
        np.concatenate([part.bands for part in parts], axis=1),
        *(np.concatenate([getattr(part, name) for part in parts]) for name in ("sets", "sketches", "sizes", "texts")),
    )


def _sign_part(texts: Sequence[str]) -> Signatures:
    normal = [normalise(text) for text in texts]
    sets = [frozenset(text.split()) for text in normal]
    sizes = np.fromiter((len(words) for words in sets), dtype=np.uint32, count=len(sets))
    result = Signatures(
        np.zeros((BANDS, len(sets)), dtype=np.uint32),
        np.zeros(len(sets), dtype=np.uint64),
        np.zeros(len(sets), dtype=np.uint64),
        sizes,
        np.array([_hash(text or raw) for text, raw in zip(normal, texts, strict=True)], dtype=np.uint64),
    )
    vocabulary: dict[str, int] = {}
    flat = np.asarray(
        [vocabulary.setdefault(word, len(vocabulary)) for words in sets for word in words], dtype=np.int64
    )
    if len(flat) == 0:
        return result
    filled = np.flatnonzero(sizes)
    starts = np.concatenate([[0], np.cumsum(sizes[filled], dtype=np.int64)])
    hashed = np.array([_hash(word) for word in vocabulary], dtype=np.uint64)
    # Sums and parities do not depend on the order of a set.
    result.sets[filled] = np.add.reduceat(hashed[flat], starts[:-1])
    bits = np.uint64(1) << (hashed & np.uint64(63))
    result.sketches[filled] = np.bitwise_xor.reduceat(bits[flat], starts[:-1])
    result.bands[:, filled] = _band_keys(_minhash(vocabulary, flat, starts))
    return result


def _minhash(vocabulary: dict[str, int], flat: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """MinHash signatures [n, permutations] uint32."""
    hashed = np.array([_hash(word, 4) for word in vocabulary], dtype=np.uint64)
    generator = np.random.Generator(np.random.Philox(key=20_260_101))
    multiply = generator.integers(1, 2**61, _PERMUTATIONS, dtype=np.uint64) | np.uint64(1)
    add = generator.integers(0, 2**61, _PERMUTATIONS, dtype=np.uint64)
    # One table of word x permutation, since few words make up many tickets.
    table = np.empty((len(hashed), _PERMUTATIONS), dtype=np.uint32)
    step = _CHUNK_TOKENS // _PERMUTATIONS
    for first in range(0, len(hashed), step):
        table[first : first + step] = (hashed[first : first + step, None] * multiply + add) >> np.uint64(32)
    count = len(starts) - 1
    result = np.empty((count, _PERMUTATIONS), dtype=np.uint32)
    first = 0
    while first < count:
        # As many sets as fit a bounded table of rows.
        last = max(first + 1, int(np.searchsorted(starts, starts[first] + step, "right")) - 1)
        part = table[flat[starts[first] : starts[last]]]
        result[first:last] = np.minimum.reduceat(part, starts[first:last] - starts[first], axis=0)
        first = last
    return result


def _band_keys(signatures: np.ndarray) -> np.ndarray:
    """[BANDS, n] uint32: the rows of each band as one number (FNV-1a over 32-bit words, mixed)."""
    keys = np.full((len(signatures), BANDS), 0xCBF29CE484222325, dtype=np.uint64)
    rows = signatures.reshape(-1, BANDS, _ROWS)
    for index in range(_ROWS):
        keys = (keys ^ rows[:, :, index]) * np.uint64(0x100000001B3)
        keys ^= keys >> np.uint64(29)
    return (keys >> np.uint64(32)).astype(np.uint32).T


def _hash(text: str, size: int = 8) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=size).digest(), "little")
