"""All tickets of a preparation as columns over their chunks. Texts stay on the disk, and so do the longer columns."""

from __future__ import annotations

import bisect
import collections
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from dist_train.prepared import load_facts
from recipes.ticket_routing import split
from recipes.ticket_routing.chunks import read_texts
from recipes.ticket_routing.config import DataConfig
from recipes.ticket_routing.groups import BLOCK_ROWS


@dataclass(frozen=True)
class Part:
    """One chunk in its place."""

    folder: Path
    first_row: int
    """Number of its first row in the source."""
    split: str | None
    """The split of all its rows, where the source names one."""


class Tickets:
    """The rows of all chunks, in order; a row's position counts those with text."""

    def __init__(self, parts: list[Part], work: Path) -> None:
        self.parts = parts
        self._work = work
        self._facts = [load_facts(part.folder) for part in parts]
        self.starts = np.concatenate([[0], np.cumsum([facts["rows"] for facts in self._facts])]).astype(np.int64)
        self._texts: dict[int, pa.ChunkedArray] = {}

    def __len__(self) -> int:
        return int(self.starts[-1])

    def empty(self) -> int:
        """Rows without text, which were left out."""
        return sum(facts["read"] - facts["rows"] for facts in self._facts)

    def counts(self) -> dict[str, int]:
        """Rows of each label."""
        counts: dict[str, int] = collections.Counter()
        for index, facts in enumerate(self._facts):
            names = facts["labels"]
            found = np.bincount(self._array(index, "labels"), minlength=len(names)).tolist()
            counts.update(dict(zip(names, found, strict=True)))
        return dict(counts)

    def first_row(self, label: str) -> int:
        """Number in the source of the first row with this label."""
        for index, facts in enumerate(self._facts):
            if label in facts["labels"]:
                place = int((self._array(index, "labels") == facts["labels"].index(label)).argmax())
                return self.parts[index].first_row + int(self._array(index, "rows")[place])
        raise KeyError(label)

    def labels(self, names: list[str]) -> np.ndarray:
        """Index in `names` of each row's label, -1 where it is none of them: [n] int32."""
        code = {name: index for index, name in enumerate(names)}

        def parts() -> Iterator[np.ndarray]:
            for index, facts in enumerate(self._facts):
                of_chunk = np.array([code.get(name, -1) for name in facts["labels"]], dtype=np.int32)
                yield of_chunk[self._array(index, "labels")]

        return self._joined("labels", np.int32, parts())

    def rows(self) -> np.ndarray:
        """Number of each row in the source: [n] int64."""
        parts = (part.first_row + self._array(index, "rows") for index, part in enumerate(self.parts))
        return self._joined("rows", np.int64, parts)

    def column(self, name: str, dtype: type) -> np.ndarray:
        """An array that every chunk keeps."""
        return self._joined(name, dtype, (self._array(index, name) for index in range(len(self.parts))))

    def band(self, index: int) -> np.ndarray:
        """Keys of one band: [n] uint32."""
        return np.concatenate([self._array(part, "bands")[index] for part in range(len(self.parts))])

    def own_split(self, data: DataConfig) -> np.ndarray | None:
        """The split that each row or its source names: [n] int8; None where none does. Rows whose source names none
        train, as with a validation file."""
        if data.split_column is not None:
            return self.column("splits", np.int8)
        if all(part.split is None for part in self.parts):
            return None
        codes = [split.WORDS[part.split or "train"] for part in self.parts]
        return np.repeat(np.array(codes, dtype=np.int8), np.diff(self.starts))

    def text(self, position: int) -> str:
        index = bisect.bisect_right(self.starts, position) - 1
        return self._chunk(index)[position - int(self.starts[index])].as_py()

    def texts(self, positions: np.ndarray) -> Iterable[str]:
        """Texts at rising positions."""
        places = np.searchsorted(positions, self.starts)
        for index, (first, last) in enumerate(itertools.pairwise(places)):
            if first < last:
                taken = self._chunk(index).take(pa.array(positions[first:last] - self.starts[index]))
                yield from taken.to_pylist()

    def _chunk(self, index: int) -> pa.ChunkedArray:
        if index not in self._texts:
            self._texts[index] = read_texts(self.parts[index].folder)["text"]
        return self._texts[index]

    def _array(self, index: int, name: str) -> np.ndarray:
        return np.load(self.parts[index].folder / f"{name}.npy", mmap_mode="r")

    def _joined(self, name: str, dtype: type, parts: Iterable[np.ndarray]) -> np.ndarray:
        """One array of all parts: in memory for a block of rows, over a file for more."""
        file = self._work / f"{name}.npy"
        if len(self) <= BLOCK_ROWS:
            result: np.ndarray = np.empty(len(self), dtype=dtype)
        else:
            result = np.lib.format.open_memmap(file, "w+", dtype, (len(self),))
        for start, part in zip(self.starts, parts, strict=False):
            result[start : start + len(part)] = part
        return np.asarray(result)
