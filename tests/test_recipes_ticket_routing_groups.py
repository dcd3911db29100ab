"""Near-duplicates are what a comparison of all pairs finds, and rows that come later change nothing before them."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from recipes.ticket_routing import groups, split
from recipes.ticket_routing.config import DataConfig
from recipes.ticket_routing.duplicates import Signatures, may_be_near, near, sign, words_of
from recipes.ticket_routing.groups import Grouped


def _texts(seed: int) -> list[str]:
    """Texts from templates, some of them near, in which most buckets hold several groups."""
    generator = random.Random(seed)
    templates = [
        [f"w{number}-{index}" for index in range(generator.choice([12, 25, 40]))]
        for number in range(generator.choice([1, 2, 4]))
    ]
    texts = []
    for _ in range(generator.choice([30, 60, 120])):
        words = list(generator.choice(templates))
        for _ in range(generator.choice([0, 1, 1, 2, 3])):
            words[generator.randrange(len(words))] = f"x{generator.randrange(300)}"
        texts.append(" ".join(words) if generator.random() > 0.05 else "!!")
    return texts


def _group(texts: list[str], signed: Signatures, rows: int, folder: Path) -> Grouped:
    return groups.group(
        signed.sets[:rows],
        signed.sketches[:rows],
        signed.sizes[:rows],
        lambda band: signed.bands[band][:rows],
        lambda row: words_of(texts[row]),
        folder,
    )


def _all_pairs(texts: list[str], signed: Signatures) -> list[int]:
    words = [words_of(text) for text in texts]
    of = list(range(len(texts)))
    for second in range(len(texts)):
        for first in range(second):
            shared = (signed.bands[:, first] == signed.bands[:, second]).any()
            if words[first] and shared and near(words[first], words[second]):
                old, new = max(of[first], of[second]), min(of[first], of[second])
                of = [new if group == old else group for group in of]
    return of


@pytest.mark.parametrize("seed", range(12))
def test_groups_are_those_that_all_pairs_give_whatever_the_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    texts = _texts(seed)
    signed = sign(texts)
    expected = _all_pairs(texts, signed)
    for few, pairs, block in ((1, 3, 1000), (2, 50, 17), (32, 1000, 17)):
        monkeypatch.setattr(groups, "_FEW", few)
        monkeypatch.setattr(groups, "_PAIRS", pairs)
        monkeypatch.setattr(groups, "BLOCK_ROWS", block)
        assert _group(texts, signed, len(texts), tmp_path / f"{few}").groups.tolist() == expected


@pytest.mark.parametrize(("seed", "crowded"), [(0, 3), (1, 3), (2, 1000), (3, 1000)])
def test_a_block_is_grouped_without_a_look_at_later_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, crowded: int
) -> None:
    monkeypatch.setattr(groups, "BLOCK_ROWS", 17)
    monkeypatch.setattr(groups, "_CROWDED", crowded)
    texts = _texts(seed)[:30] + _texts(seed + 100)[:30]
    signed = sign(texts)
    whole = _group(texts, signed, len(texts), tmp_path / "whole")
    for rows in range(17, len(texts), 17):
        part = _group(texts, signed, rows, tmp_path / f"{rows}")
        assert whole.then[:rows].tolist() == part.then.tolist()
        assert part.then[rows - 17 :].tolist() == part.groups[rows - 17 :].tolist()


def test_the_sketch_never_hides_a_near_pair() -> None:
    texts = [text for seed in range(3) for text in _texts(seed)]
    signed, words = sign(texts), [words_of(text) for text in texts]
    first, second = np.triu_indices(len(texts), 1)
    may = may_be_near((signed.sketches[first], signed.sketches[second]), (signed.sizes[first], signed.sizes[second]))
    is_near = np.array([near(words[a], words[b]) for a, b in zip(first, second, strict=True)])
    assert is_near.any()
    assert may[is_near].all()
    assert may.mean() < 3 * is_near.mean(), "most others are told by the sketch"


@pytest.mark.parametrize("seed", range(5))
def test_rows_that_are_appended_leave_the_blocks_before_them_as_they_are(
    monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(split, "BLOCK_ROWS", 200)
    generator = np.random.default_rng(seed)
    labels = generator.choice(4, 1000, p=[0.6, 0.2, 0.15, 0.05]).astype(np.int32)
    earlier = generator.integers(0, np.maximum(np.arange(1000), 1))
    parent = np.where(generator.random(1000) < 0.2, earlier, np.arange(1000))
    for row in range(1000):
        parent[row] = parent[parent[row]]
    grouped = Grouped(parent.astype(np.uint32), parent.astype(np.uint32))
    whole = split.stratified(labels, grouped, DataConfig(split_seed=seed))
    for rows in (200, 400, 600):
        part = Grouped(grouped.groups[:rows], grouped.then[:rows])
        assert whole[:rows].tolist() == split.stratified(labels[:rows], part, DataConfig(split_seed=seed)).tolist()
    assert all(len(set(whole[parent == group])) == 1 for group in np.unique(parent))
    for label in range(4):
        assert (whole[labels == label] == split.TEST).mean() == pytest.approx(0.2, abs=0.06)


def test_groups_that_a_later_row_unites_all_train(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split, "BLOCK_ROWS", 100)
    labels = np.zeros(101, dtype=np.int32)
    apart = np.arange(100, dtype=np.uint32)
    alone = split.stratified(labels[:100], Grouped(apart, apart), DataConfig())
    trained, tested = int(np.flatnonzero(alone == split.TRAIN)[0]), int(np.flatnonzero(alone == split.TEST)[0])
    first, second = min(trained, tested), max(trained, tested)
    united = np.append(apart, np.uint32(first))
    united[second] = first
    then = np.append(apart, np.uint32(first))
    result = split.stratified(labels, Grouped(united, then), DataConfig())
    assert set(result[[trained, tested, 100]]) == {split.TRAIN}
    unmoved = np.delete(np.arange(100), [trained, tested])
    assert result[unmoved].tolist() == alone[unmoved].tolist()
