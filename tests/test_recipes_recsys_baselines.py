"""Baselines count in blocks, so that their memory does not grow with the log."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse

from recipes.recsys.baselines import similar


@pytest.mark.parametrize("pairs", [1, 30, 10**6])
def test_items_are_as_similar_in_blocks_of_any_size(pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recipes.recsys.baselines._BLOCK", pairs)
    scaled = sparse.random(40, 12, 0.3, format="csr", random_state=0, dtype=np.float32)
    expected = (scaled.T @ scaled).toarray()
    np.fill_diagonal(expected, 0)
    blocks = list(similar(scaled))
    assert (len(blocks) == 1) == (pairs == 10**6)
    np.testing.assert_allclose(sparse.vstack(blocks).toarray(), expected, rtol=1e-5)
