"""Corruptions: the same for a seed, stronger with the severity, in the range of the pixels."""

from __future__ import annotations

import numpy as np
import pytest

from recipes.defect_detection.config import SyntheticConfig
from recipes.defect_detection.corruptions import CORRUPTIONS, corrupt
from recipes.defect_detection.synthetic import generate

KINDS = sorted({name.rsplit("-", 1)[0] for name in CORRUPTIONS})


def _image(channels: int = 1, height: int = 64, width: int = 48) -> np.ndarray:
    image = next(iter(generate(SyntheticConfig(), height, width, 3, 4)))[0]
    return np.stack([np.roll(image, 5 * channel, axis=0) for channel in range(channels)])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_each_changes_the_image_within_its_range_and_repeats(name: str, channels: int) -> None:
    image = _image(channels)
    before = image.copy()
    changed = corrupt(image, name, 5)
    assert changed.dtype == np.uint8
    assert changed.shape == image.shape
    assert np.array_equal(image, before)
    assert not np.array_equal(changed, image)
    assert np.array_equal(changed, corrupt(image, name, 5))


@pytest.mark.parametrize("kind", KINDS)
def test_more_severe_ones_differ_more(kind: str) -> None:
    image = _image(1, 96, 96)
    errors = [np.mean((corrupt(image, f"{kind}-{severity}", 0).astype(float) - image) ** 2) for severity in (1, 2, 3)]
    assert 0 < errors[0] < errors[1] < errors[2]


def test_noise_depends_on_the_seed_and_the_rest_does_not() -> None:
    image = _image()
    for name in CORRUPTIONS:
        same = np.array_equal(corrupt(image, name, 0), corrupt(image, name, 1))
        assert same == (not name.startswith("noise"))


@pytest.mark.parametrize("value", [0, 255])
def test_black_and_white_do_not_wrap_around(value: int) -> None:
    image = np.full((1, 32, 32), value, dtype=np.uint8)
    for name in CORRUPTIONS:
        mean = corrupt(image, name, 0).mean()
        assert (mean < 110) if value == 0 else (mean > 70)


def test_blur_and_defocus_keep_the_mean_and_contrast_keeps_it_too() -> None:
    image = _image()
    for name in ("blur-3", "defocus-3", "contrast-3"):
        assert corrupt(image, name, 0).mean() == pytest.approx(image.mean(), abs=1.5)
    point = np.zeros((1, 21, 21), dtype=np.uint8)
    point[0, 10, 10] = 255
    spread = corrupt(point, "defocus-2", 0)[0]
    assert np.array_equal(spread, spread.T)
    assert np.array_equal(spread, spread[::-1])
    assert spread.sum() == pytest.approx(255, abs=10)
