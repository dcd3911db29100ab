"""An item's content as numbers, fitted to the items of the training events alone. Torch-free."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from recipes.recsys.config import DataConfig
from recipes.recsys.item_table import ItemTable

# Of words: numbers too, since model names and sizes tell much.
_TOKEN = r"(?u)\b\w+\b"
_MOST_WORDS = 50_000
_MOST_CATEGORIES = 100_000
_HASHED_AT_ONCE = 100_000
FITTED = "content.json"


class ContentModel:
    """What turns a row of the item table into numbers: words with their weights and axes, categories, means."""

    def __init__(self, state: dict[str, Any], axes: np.ndarray) -> None:
        self._state = state
        self._axes = axes
        """Those of all text columns, one below the other: [words, text_dims] float32."""

    @property
    def category_sizes(self) -> list[int]:
        """Of each category column, how many there are; 0 is one that is unknown."""
        return [len(names) + 1 for names in self._state["categories"]]

    @property
    def width(self) -> int:
        """Numbers of an item, beside its categories."""
        return len(self._state["words"]) * int(self._state["text_dims"]) + 2 * len(self._state["means"])

    def encode(self, table: ItemTable) -> tuple[np.ndarray, np.ndarray]:
        """numbers [items, width] float32, of a size of about 1 each; categories [items, columns] int32."""
        parts = self._texts(table)
        missing = np.isnan(table.numbers)
        scaled = (table.numbers - self._state["means"]) / self._state["spreads"] if missing.size else table.numbers
        parts += [np.clip(np.where(missing, 0, scaled), -5, 5), missing]
        numbers = np.concatenate(parts, axis=1, dtype=np.float32)
        categories = np.zeros((len(table), len(table.categories)), dtype=np.int32)
        for place, (column, names) in enumerate(zip(table.categories, self._state["categories"], strict=True)):
            codes = {name: index + 1 for index, name in enumerate(names)}
            categories[:, place] = [codes.get(name, 0) for name in column]
        return numbers, categories

    def _texts(self, table: ItemTable) -> list[np.ndarray]:
        """Of each text column: [items, text_dims]."""
        words: list[list[str]] = self._state["words"]
        if self._state["text_features"] == "hashed":
            return [_hashed(texts, self._state["text_dims"]) for texts in table.texts]
        ends = np.cumsum([len(own) for own in words])
        axes = [self._axes[end - len(own) : end] for own, end in zip(words, ends, strict=True)]
        columns = zip(table.texts, words, axes, strict=True)
        return [_unit(np.asarray(_counts(texts, own) @ its_axes)) for texts, own, its_axes in columns]

    def save(self, folder: Path) -> None:
        (folder / FITTED).write_text(json.dumps(self._state, ensure_ascii=False) + "\n", encoding="utf-8")
        np.save(folder / "content_axes.npy", self._axes)

    @staticmethod
    def load(folder: Path) -> ContentModel:
        state = json.loads((folder / FITTED).read_text(encoding="utf-8"))
        return ContentModel(state, np.load(folder / "content_axes.npy"))


def fit_content(table: ItemTable, data: DataConfig) -> ContentModel:
    """table: the items of the training events, and no others."""
    fitted: list[tuple[list[str], np.ndarray]] = [
        _fit_words(texts, data.text_dims) if data.text_features == "svd" else ([], np.zeros((0, data.text_dims)))
        for texts in table.texts
    ]
    state: dict[str, Any] = {"text_features": data.text_features, "text_dims": data.text_dims}
    state["words"] = [words for words, _ in fitted]
    axes = np.concatenate([np.zeros((0, data.text_dims), np.float32), *(own for _, own in fitted)])
    known = [column[~np.isnan(column)] for column in table.numbers.T]
    state["means"] = [float(column.mean()) if len(column) else 0.0 for column in known]
    state["spreads"] = [float(column.std()) or 1.0 if len(column) else 1.0 for column in known]
    state["categories"] = [_commonest(column) for column in table.categories]
    return ContentModel(state, axes)


def _fit_words(texts: list[str], dims: int) -> tuple[list[str], np.ndarray]:
    """The words, and their axes times their weight: TF-IDF and a truncated SVD (latent semantic analysis)."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.utils.extmath import randomized_svd

    vectorizer = TfidfVectorizer(
        sublinear_tf=True, min_df=2, max_features=_MOST_WORDS, token_pattern=_TOKEN, dtype=np.float32
    )
    try:
        weighted = vectorizer.fit_transform(texts)
    except ValueError:  # no word stands in two items
        return [], np.zeros((0, dims), dtype=np.float32)
    words = vectorizer.get_feature_names_out().tolist()
    rank = min(dims, *weighted.shape)
    _, _, right = randomized_svd(weighted, rank, random_state=0)
    axes = np.zeros((len(words), dims), dtype=np.float32)
    axes[:, :rank] = right.T * vectorizer.idf_[:, None]
    return words, axes


def _counts(texts: list[str], words: list[str]) -> Any:
    """Sublinear counts of the words: a sparse matrix [texts, words]."""
    from sklearn.feature_extraction.text import CountVectorizer

    if not words:
        return np.zeros((len(texts), 0), dtype=np.float32)
    counts = CountVectorizer(vocabulary=words, token_pattern=_TOKEN, dtype=np.float32).transform(texts)
    counts.data = 1 + np.log(counts.data)
    return counts


def _hashed(texts: list[str], dims: int) -> np.ndarray:
    """Signed hashes of the words (Weinberger et al. 2009)."""
    from sklearn.feature_extraction.text import HashingVectorizer

    hasher = HashingVectorizer(n_features=dims, token_pattern=_TOKEN, norm=None, dtype=np.float32)
    parts = [hasher.transform(texts[at : at + _HASHED_AT_ONCE]) for at in range(0, len(texts), _HASHED_AT_ONCE)]
    return _unit(np.concatenate([part.toarray() for part in parts])) if parts else np.zeros((0, dims))


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Of a mean square of 1; an item without words is 0."""
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, length, out=np.zeros_like(vectors), where=length > 0) * np.sqrt(vectors.shape[1])


def _commonest(column: list[str]) -> list[str]:
    names, counts = np.unique([name for name in column if name], return_counts=True)
    order = np.lexsort((names, -counts))[:_MOST_CATEGORIES]
    return [str(name) for name in names[order]]
