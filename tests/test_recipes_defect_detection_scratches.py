"""A drawn scratch: as wide, long and dark or light as asked, in the image whatever its size, its mask on it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import ndimage

from recipes.defect_detection.scratches import draw_scratch


def _grey(height: int, width: int, value: float = 0.5, channels: int = 1) -> np.ndarray:
    return np.full((channels, height, width), value, dtype=np.float32)


def _drawn(seed: int, image: np.ndarray, *size: float) -> tuple[np.ndarray, np.ndarray]:
    return draw_scratch(image, np.random.default_rng(seed), *size)


@pytest.mark.parametrize(("width", "length", "contrast"), [(0.5, 20, 0.3), (1.5, 30, 0.25), (4, 60, 0.1)])
def test_width_length_and_contrast_are_as_asked(width: float, length: float, contrast: float) -> None:
    image = _grey(128, 128)
    changes, extents = [], []
    for seed in range(150):
        scratched, mask = _drawn(seed, image, width, length, contrast)
        changes.append(float(np.abs(scratched - image).sum()))
        y, x = np.nonzero(mask)
        extents.append(np.hypot(np.ptp(y) + 1, np.ptp(x) + 1))
    # Its volume is width times length times contrast, less the rounding of the ends.
    assert np.mean(changes) == pytest.approx(width * length * contrast, rel=0.08)
    assert np.mean(extents) == pytest.approx(length, rel=0.08)


def test_the_mask_is_as_wide_as_asked() -> None:
    for width in (1.0, 2.5, 5.0):
        marked = []
        for seed in range(40):
            _, mask = draw_scratch(_grey(96, 96), np.random.default_rng(seed), width, 60.0, 0.2, direction=0.0)
            across = mask.sum(axis=0)
            marked.append(across[across > 0][15:-15].mean())
        assert np.mean(marked) == pytest.approx(width, abs=0.4)


def test_it_is_darker_as_often_as_lighter() -> None:
    image = _grey(40, 40)
    darker = [(_drawn(seed, image, 1.5, 20, 0.2)[0] - image).sum() < 0 for seed in range(200)]
    assert 70 < sum(darker) < 130


@settings(max_examples=60, deadline=None)
@example(248367, 16, 16, 1.0, 196.0, 1.0, 0.0, 1)
@example(29787, 16, 16, 0.75, 1.0, 1.0, 0.0, 1)
@given(
    st.integers(0, 2**32),
    st.integers(16, 70),
    st.integers(16, 70),
    st.floats(0.1, 8),
    st.floats(1, 200),
    st.floats(0.02, 1),
    st.sampled_from([0.0, 0.2, 0.5, 0.97, 1.0]),
    st.sampled_from([1, 3]),
)
def test_no_image_is_left_without_it(
    seed: int, height: int, width: int, width_px: float, length: float, contrast: float, value: float, channels: int
) -> None:
    image = _grey(height, width, value, channels)
    before = image.copy()
    scratched, mask = _drawn(seed, image, width_px, length, contrast)
    assert np.array_equal(image, before)
    assert scratched.dtype == np.float32
    assert mask.dtype == np.uint8
    assert mask.any()
    assert set(np.unique(mask)) <= {0, 1}
    assert scratched.min() >= 0
    assert scratched.max() <= 1
    changed = (scratched != image).any(axis=0)
    assert changed[mask > 0].all()
    # At the border the line itself may lie outside.
    assert not (changed & ~ndimage.binary_dilation(mask, np.ones((3, 3))))[1:-1, 1:-1].any()


def test_the_same_generator_draws_the_same_scratch() -> None:
    image = _grey(50, 30)
    one, other, third = (_drawn(seed, image, 1.5, 20, 0.2) for seed in (3, 3, 4))
    assert np.array_equal(one[0], other[0])
    assert np.array_equal(one[1], other[1])
    assert not np.array_equal(one[1], third[1])
