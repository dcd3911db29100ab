"""Texture features: of one length for any image, and telling of a small scratch."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage
from sklearn.metrics import roc_auc_score

from recipes.defect_detection.config import SyntheticConfig
from recipes.defect_detection.scratches import draw_scratch
from recipes.defect_detection.synthetic import generate
from recipes.defect_detection.texture import _binary_patterns, _cells, texture_features


def _plates(count: int) -> list[np.ndarray]:
    return [image for image, *_ in generate(SyntheticConfig(defective_share=1e-12), 96, 96, 0, count)]


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 17, 90), (1, 128, 128), (1, 45, 33)])
def test_there_are_as_many_for_any_size_and_all_are_finite(shape: tuple[int, int, int]) -> None:
    generator = np.random.default_rng(0)
    expected = len(texture_features(np.zeros((1, 64, 64), dtype=np.uint8)))
    for image in (generator.integers(0, 256, shape), np.zeros(shape), np.full(shape, 255)):
        features = texture_features(image.astype(np.uint8))
        assert features.dtype == np.float32
        assert features.shape == (expected,)
        assert np.isfinite(features).all()


def test_grey_and_the_same_grey_in_three_channels_are_alike() -> None:
    image = _plates(1)[0][None]
    assert np.allclose(texture_features(image), texture_features(np.repeat(image, 3, axis=0)), rtol=1e-4, atol=1e-4)


def test_some_feature_alone_tells_a_small_scratch() -> None:
    """It is a fair opponent only if a scratch of 0.3 % of the image shows."""
    good = _plates(40)
    bad = []
    for index, image in enumerate(good):
        drawn, _ = draw_scratch(image[None] / np.float32(255), np.random.default_rng(index), 1.5, 25, 0.35)
        bad.append((drawn[0] * 255).astype(np.uint8))
    values = np.array([texture_features(image[None]) for image in [*good, *bad]])
    truth = [0] * len(good) + [1] * len(bad)
    areas = [roc_auc_score(truth, values[:, column]) for column in range(values.shape[1])]
    assert max(max(areas), 1 - min(areas)) > 0.8


def test_means_over_cells_are_those_of_the_pixels() -> None:
    fields = np.random.default_rng(0).random((2, 20, 37)).astype(np.float32)
    cells = _cells(fields, 16)
    assert cells.shape == (2, 2, 3)
    assert np.allclose(cells[1, 1, 2], fields[1, 16:, 32:].mean(), rtol=1e-5)
    assert np.allclose(cells[0, 0, 1], fields[0, :16, 16:32].mean(), rtol=1e-5)


def test_patterns_do_not_change_with_brightness_or_right_angles() -> None:
    grey = ndimage.gaussian_filter(np.random.default_rng(0).random((40, 40)), 1)
    histogram = _binary_patterns(grey)
    assert histogram.sum() == pytest.approx(1)
    assert np.allclose(histogram, _binary_patterns(2 * grey + 1))
    assert np.allclose(histogram, _binary_patterns(np.rot90(grey)))
    assert _binary_patterns(np.ones((9, 9)))[8] == 1
