"""Splits that keep parts together and are as exact as the parts' sizes allow."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.defect_detection.config import DataConfig
from recipes.defect_detection.listing import TEST, TRAIN, VALIDATION
from recipes.defect_detection.split import crossing, group_images, split_images, split_items

SHARES = {TRAIN: 0.6, VALIDATION: 0.15, TEST: 0.25}


def test_images_are_joined_by_any_value_that_they_share() -> None:
    parts, hashes = ["a", "a", "b", "c", "d", "e"], [1, 2, 2, 3, 4, 3]
    groups = group_images(parts, hashes)
    assert [groups.tolist().index(group) for group in groups.tolist()] == [0, 0, 0, 3, 4, 3]
    assert len(set(group_images(["x", "y"], ["y", "x"]).tolist())) == 2, "columns do not share their values"


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 20)), min_size=1, max_size=120),
    st.integers(0, 5),
    st.sampled_from([None, 3]),
)
@settings(max_examples=60, deadline=None)
def test_no_group_is_ever_parted(rows: list[tuple[int, int]], seed: int, folds: int | None) -> None:
    strata, groups = (np.array(column) for column in zip(*rows, strict=True))
    config = DataConfig(split_seed=seed, folds=folds, fold=0 if folds is None else 1)
    split_of = split_items(strata, groups, config)
    assert crossing(groups.tolist(), split_of) == 0
    assert (split_items(strata, groups, config) == split_of).all()
    assert set(split_of.tolist()) <= {TRAIN, VALIDATION, TEST}


@pytest.mark.parametrize("largest", [1, 3, 9])
def test_each_kind_has_its_share_of_each_split(largest: int) -> None:
    generator = np.random.default_rng(0)
    sizes = generator.integers(1, largest + 1, 600)
    groups = np.repeat(np.arange(600), sizes)
    strata = np.where(generator.random(len(groups)) < 0.8, 0, generator.integers(1, 5, len(groups)))
    for seed in range(3):
        split_of = split_items(strata, groups, DataConfig(split_seed=seed))
        for kind in range(5):
            own = split_of[strata == kind]
            for split, share in SHARES.items():
                assert abs((own == split).sum() - share * len(own)) <= 1 + largest / 2, (kind, split)


def test_another_seed_splits_otherwise_and_at_random() -> None:
    strata, groups = np.zeros(1000, dtype=int), np.arange(1000)
    first, second = (split_items(strata, groups, DataConfig(split_seed=seed)) for seed in range(2))
    assert (first == TEST).sum() == (second == TEST).sum() == 250
    both = ((first == TEST) & (second == TEST)).sum()
    assert 40 < both < 85, "of chance 62.5"


def test_three_parts_of_a_kind_lie_in_the_three_splits_and_single_ones_do_not_all_train() -> None:
    for size in (1, 4):
        strata = np.repeat([0] * 30 + [1] * 3, size)
        split_of = split_items(strata, np.repeat(np.arange(33), size), DataConfig())
        assert set(split_of[strata == 1].tolist()) == {TRAIN, VALIDATION, TEST}
    strata = np.array([0] * 40 + list(range(1, 21)))
    split_of = split_items(strata, np.arange(60), DataConfig())
    rare = np.bincount(split_of[40:], minlength=3)
    assert abs(rare[TEST] - 5) <= 1
    assert abs(rare[TRAIN] - 12) <= 1


def test_the_folds_share_nothing_and_make_up_the_whole() -> None:
    generator = np.random.default_rng(0)
    groups = generator.integers(0, 60, 300)
    strata = (groups % 10 == 0).astype(int)
    tested = np.zeros(300, dtype=int)
    for fold in range(5):
        split_of = split_items(strata, groups, DataConfig(folds=5, fold=fold))
        tested += split_of == TEST
        assert 40 <= (split_of == TEST).sum() <= 80
        assert 30 <= (split_of == VALIDATION).sum() <= 60
        assert crossing(groups.tolist(), split_of) == 0
    assert (tested == 1).all()


def test_what_a_given_split_lacks_comes_out_of_its_training_images() -> None:
    strata, groups = np.arange(300) % 2, np.arange(300) // 3
    own = np.where(groups < 80, TRAIN, TEST).astype(np.int8)
    split_of, method = split_images(strata, groups, own, np.zeros(300, dtype=bool), DataConfig())
    assert method == "given, validation out of its training images"
    assert ((split_of == TEST) == (own == TEST)).all()
    assert (split_of == VALIDATION).sum() == pytest.approx(240 * 0.15 / 0.75, abs=3)
    assert crossing(groups.tolist(), split_of) == 0
    split_of, method = split_images(
        strata, groups, np.zeros(300, dtype=np.int8), np.zeros(300, dtype=bool), DataConfig()
    )
    assert [int((split_of == split).sum()) for split in (TRAIN, VALIDATION, TEST)] == pytest.approx(
        [180, 45, 75], abs=4
    )


def test_what_lies_in_test_only_takes_its_part_along() -> None:
    strata, groups = np.array([0, 1] * 30), np.arange(60) // 4
    only = np.zeros(60, dtype=bool)
    only[[0, 9]] = True
    for own in (None, np.array([TRAIN] * 40 + [VALIDATION] * 10 + [TEST] * 10, dtype=np.int8)):
        split_of, _ = split_images(strata, groups, own, only, DataConfig())
        assert (split_of[:4] == TEST).all()
        assert (split_of[8:12] == TEST).all()
        assert (split_of == TRAIN).any()
