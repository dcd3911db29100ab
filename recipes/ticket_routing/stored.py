"""Read a split of a prepared folder: arrays over memory maps, texts and tokens from the chunks. Torch-free."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from recipes.ticket_routing.chunks import open_texts


class StoredSplit:
    """The rows of "train", "validation" or "test", in the order of the source."""

    def __init__(self, folder: Path | str, name: str) -> None:
        self._folder = Path(folder)
        positions = self._array(name)
        self.rows = self._array("rows")[positions]
        """Number of each row in the source: [n] int64."""
        self.labels = self._array("labels")[positions]
        """[n] int32."""
        self.lengths = self._array("lengths")[positions]
        """Tokens of each row: [n] int32."""
        starts = self._array("starts")
        # A chunk holds its rows at rising positions, so this split's rows in it lie side by side.
        self._bounds = np.searchsorted(positions, starts)
        self._positions, self._starts = positions, starts
        self._tokens: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __len__(self) -> int:
        return len(self._positions)

    def tokens(self, index: int) -> np.ndarray:
        """Token ids of a row, a view of the memory map."""
        position = int(self._positions[index])
        chunk = int(np.searchsorted(self._starts, position, side="right")) - 1
        if chunk not in self._tokens:
            self._tokens[chunk] = (self._array(f"chunks/{chunk:06d}.ids"), self._array(f"chunks/{chunk:06d}.offsets"))
        ids, offsets = self._tokens[chunk]
        local = position - int(self._starts[chunk])
        return ids[offsets[local] : offsets[local + 1]]

    def texts(self, chosen: np.ndarray | None = None) -> list[str]:
        """Texts of all rows, or of those at `chosen`, rising."""
        return self._column("text", chosen).to_pylist()

    def table(self) -> pa.Table:
        """row, id and label of each row. A row that has no id of its own is named by its number."""
        ids = self._column("id", None)
        numbers = pa.array(self.rows).cast(pa.large_string())
        return pa.table(
            {
                "row": self.rows,
                "id": pa.compute.coalesce(ids, numbers).cast(pa.string()),
                "label": self.labels,
            }
        )

    def _column(self, name: str, chosen: np.ndarray | None) -> pa.ChunkedArray:
        positions = self._positions if chosen is None else self._positions[chosen]
        bounds = self._bounds if chosen is None else np.searchsorted(positions, self._starts)
        parts: list[Any] = []
        for chunk, (first, last) in enumerate(itertools.pairwise(bounds)):
            if first < last:
                column = open_texts(self._folder / "chunks" / f"{chunk:06d}.arrow")[name]
                parts += column.take(pa.array(positions[first:last] - self._starts[chunk])).chunks
        return pa.chunked_array(parts, pa.large_string())

    def _array(self, name: str) -> np.ndarray:
        return np.asarray(np.load(self._folder / f"{name}.npy", mmap_mode="r"))
