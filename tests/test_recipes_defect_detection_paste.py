"""Copy-paste of a defect: where its mask says, matched to the surroundings, always inside."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from recipes.defect_detection.paste import paste_defect


def _part(value: int, size: tuple[int, int] = (40, 50), channels: int = 1) -> np.ndarray:
    return np.full((channels, *size), value, dtype=np.uint8)


def _scratched(value: int, change: int) -> tuple[np.ndarray, np.ndarray]:
    """An L of pixels, so that every mirrored one differs."""
    image, mask = _part(value), np.zeros((40, 50), dtype=np.uint8)
    mask[10:20, 12] = 1
    mask[19, 12:16] = 1
    image[:, mask > 0] = value + change
    return image, mask


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.booleans(), st.sampled_from([1, 3]), st.integers(30, 220))
def test_the_defect_lies_inside_and_the_mask_on_it(seed: int, flips: bool, channels: int, value: int) -> None:
    source, mask = _scratched(100, -70)
    target = _part(value, (25, 30), channels)
    before = target.copy()
    image, pasted = paste_defect(target, np.repeat(source, channels, 0), mask, np.random.default_rng(seed), flips)
    assert np.array_equal(target, before)
    assert image.dtype == pasted.dtype == np.uint8
    assert image.shape == target.shape
    assert pasted.sum() == mask.sum()
    # The surroundings are matched: nothing but the defect differs, and as much as it did from its own.
    assert np.array_equal(image[0] != target[0], pasted > 0)
    assert (image[:, pasted > 0] == max(0, value - 70)).all()


def test_it_is_set_anywhere_and_mirrored_only_if_asked() -> None:
    source, mask = _scratched(100, 60)
    for flips, ways in ((False, 1), (True, 4)):
        places, shapes = set(), set()
        for seed in range(120):
            pasted = paste_defect(_part(90), source, mask, np.random.default_rng(seed), flips)[1]
            y, x = np.nonzero(pasted)
            places.add((y.min(), x.min()))
            shapes.add(pasted[y.min() : y.max() + 1, x.min() : x.max() + 1].tobytes())
        assert len(shapes) == ways
        assert len(places) > 90


def test_its_edge_is_feathered() -> None:
    generator = np.random.default_rng(0)
    source = generator.integers(80, 120, (1, 40, 50)).astype(np.uint8)
    _, mask = _scratched(100, 0)
    image, pasted = paste_defect(_part(150), source, mask, np.random.default_rng(1), False)
    changed = (image[0] != 150).astype(bool)
    distance = ndimage.distance_transform_edt(pasted == 0)
    assert not changed[distance > 4].any()
    size = np.abs(image[0].astype(int) - 150)
    assert size[distance == 1].mean() > 1.5 * size[(distance > 2.5) & (distance < 4)].mean() > 0


def test_one_defect_of_several_is_taken_and_a_broken_line_is_one() -> None:
    mask = np.zeros((40, 50), dtype=np.uint8)
    mask[5, 5:10] = mask[5, 12:15] = 1  # broken by two pixels
    mask[30, 30] = 1
    counts = {
        int(paste_defect(_part(90), _part(120), mask, np.random.default_rng(seed), False)[1].sum())
        for seed in range(20)
    }
    assert counts == {8, 1}


def test_a_defect_at_the_border_or_over_the_whole_image_is_pasted() -> None:
    mask = np.zeros((40, 50), dtype=np.uint8)
    mask[0, 0] = mask[1, 1] = 1
    assert paste_defect(_part(9), _part(120), mask, np.random.default_rng(0), True)[1].sum() == 2
    whole = np.ones((40, 50), dtype=np.uint8)
    image, pasted = paste_defect(_part(9), _part(120), whole, np.random.default_rng(0), True)
    assert pasted.all()
    assert (image == 120).all()


def test_nothing_to_paste_and_too_large_a_defect_are_refused() -> None:
    source, mask = _scratched(100, 60)
    with pytest.raises(ValueError, match="empty"):
        paste_defect(_part(90), source, np.zeros_like(mask), np.random.default_rng(0), False)
    with pytest.raises(ValueError, match="pixels, but the target"):
        paste_defect(_part(90, (8, 8)), source, mask, np.random.default_rng(0), False)


def test_the_same_generator_pastes_the_same() -> None:
    source, mask = _scratched(100, 60)
    one, other = (paste_defect(_part(90), source, mask, np.random.default_rng(7), True) for _ in range(2))
    assert np.array_equal(one[0], other[0])
    assert np.array_equal(one[1], other[1])
