"""Generated images of brushed metal: the same for a seed, as stated, and marked where they are scratched."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from recipes.defect_detection import synthetic
from recipes.defect_detection.config import SyntheticConfig
from recipes.defect_detection.synthetic import generate

HALF = SyntheticConfig(defective_share=0.5)
NEVER = SyntheticConfig(defective_share=1e-12)


def _images(config: SyntheticConfig, height: int, width: int, start: int, stop: int) -> np.ndarray:
    return np.array([image for image, _, _ in generate(config, height, width, start, stop)])


def test_a_seed_and_version_always_give_the_same_images() -> None:
    digest = hashlib.sha256()
    for image, mask, kind in generate(HALF, 48, 64, 0, 6):
        digest.update(image.tobytes() + mask.tobytes() + kind.encode())
    recorded = {1: "9d115594b4cafcd0"}
    assert digest.hexdigest()[:16] == recorded[synthetic.VERSION], "other images: raise VERSION and record the hash"


def test_another_seed_gives_other_images() -> None:
    one, other = (_images(SyntheticConfig(seed=seed), 32, 32, 0, 3) for seed in (0, 1))
    assert all((a != b).mean() > 0.5 for a, b in zip(one, other, strict=True))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 40), st.integers(0, 5), st.integers(0, 5))
def test_an_image_does_not_depend_on_which_others_are_made(index: int, before: int, after: int) -> None:
    alone = next(iter(generate(HALF, 24, 32, index, index + 1)))
    first = max(0, index - before)
    among = list(generate(HALF, 24, 32, first, index + 1 + after))[index - first]
    assert np.array_equal(alone[0], among[0])
    assert np.array_equal(alone[1], among[1])
    assert alone[2] == among[2]


@pytest.mark.parametrize(("height", "width"), [(16, 16), (16, 90), (33, 47), (130, 31)])
def test_images_of_any_size_are_made(height: int, width: int) -> None:
    for image, mask, kind in generate(HALF, height, width, 0, 6):
        assert image.shape == mask.shape == (height, width)
        assert image.dtype == mask.dtype == np.uint8
        assert image.std() > 4
        assert mask.any() == (kind == "scratch")


@pytest.mark.parametrize("share", [0.02, 0.05, 0.3])
def test_the_stated_share_is_defective(share: float) -> None:
    config = SyntheticConfig(defective_share=share)
    kinds = [kind for _, _, kind in generate(config, 16, 16, 0, 1500)]
    assert set(kinds) == {"", "scratch"}
    deviation = np.sqrt(share * (1 - share) / len(kinds))
    assert abs(kinds.count("scratch") / len(kinds) - share) < 3.5 * deviation


def test_pixels_change_in_the_mask_and_at_its_edge_alone() -> None:
    """The surface of a part is drawn apart from its scratches: with and without them it is the same one."""
    marked = []
    for (image, mask, kind), (clean, nothing, good) in zip(
        generate(HALF, 96, 96, 0, 40), generate(NEVER, 96, 96, 0, 40), strict=True
    ):
        assert not nothing.any()
        assert good == ""
        changed = image != clean
        assert not (changed & ~ndimage.binary_dilation(mask, np.ones((3, 3)))).any()
        assert changed.any() == (kind == "scratch")
        marked.append(changed[mask > 0])
    # A few pixels of a stroke are as dark or light as can be already.
    assert np.concatenate(marked).mean() > 0.98


def test_scratches_have_the_stated_contrast_and_width() -> None:
    settings_ = {"lighting": 0.0, "dust_per_image": 0.0, "defective_share": 0.5}
    for width, contrast in ((1.0, 0.2), (3.0, 0.1)):
        config = SyntheticConfig(scratch_width_px=width, scratch_contrast=contrast, **settings_)
        never = SyntheticConfig(**{**settings_, "defective_share": 1e-12})
        area, change = [], []
        for (image, mask, kind), (clean, *_) in zip(
            generate(config, 128, 128, 0, 160), generate(never, 128, 128, 0, 160), strict=True
        ):
            parts = ndimage.label(mask, np.ones((3, 3)))[1]
            if kind and parts == 1:
                difference = np.abs(image.astype(float) - clean) / 255
                change.append(difference.sum())
                area.append(_extent(mask))
        # The sum over a scratch is width times length times contrast.
        assert np.sum(change) / np.sum(area) == pytest.approx(width * contrast, rel=0.12)


def _extent(mask: np.ndarray) -> float:
    """Length of a slightly bent line, from its farthest corners."""
    y, x = np.nonzero(mask)
    return float(np.hypot(np.ptp(y) + 1, np.ptp(x) + 1))


def test_scratches_have_the_stated_mean_length() -> None:
    config = SyntheticConfig(scratch_length_px=40, defective_share=0.5)
    masks = [mask for _, mask, kind in generate(config, 128, 128, 0, 500) if kind]
    lengths = [_extent(mask) for mask in masks if ndimage.label(mask, np.ones((3, 3)))[1] == 1]
    # A few of them are two that touch, and are longer.
    assert np.mean(lengths) == pytest.approx(41.5, abs=3)
    assert np.percentile(lengths, 3) == pytest.approx(21, abs=3)
    assert np.percentile(lengths, 95) == pytest.approx(59, abs=4)


def test_lighting_and_dust_are_as_far_as_stated() -> None:
    base = {"defective_share": 1e-12, "dust_per_image": 0.0}
    lit = _images(SyntheticConfig(lighting=0.3, **base), 64, 64, 0, 30).astype(float)
    flat = _images(SyntheticConfig(lighting=0.0, **base), 64, 64, 0, 30).astype(float)
    assert np.ptp(lit - flat, axis=(1, 2)).mean() / 255 == pytest.approx(0.3, abs=0.01)
    specks = [0, 0]
    for number, dust in enumerate((2.0, 6.0)):
        config = SyntheticConfig(lighting=0.0, **{**base, "dust_per_image": dust})
        dusty = _images(config, 128, 128, 0, 60).astype(float)
        clean = _images(SyntheticConfig(lighting=0.0, **base), 128, 128, 0, 60).astype(float)
        specks[number] = sum(ndimage.label(np.abs(a - b) > 4)[1] for a, b in zip(dusty, clean, strict=True))
    assert specks[0] / 60 == pytest.approx(2.0, rel=0.25)
    assert specks[1] / 60 == pytest.approx(6.0, rel=0.25)


def test_strokes_of_the_brush_run_with_the_grain_and_scratches_across_it() -> None:
    """The direction of a scratch, in its mask, against the one that the whole image shows."""
    aside = []
    for image, mask, kind in generate(SyntheticConfig(defective_share=0.5, scratch_length_px=60), 128, 128, 0, 80):
        if kind and ndimage.label(mask, np.ones((3, 3)))[1] == 1:
            y, x = np.nonzero(mask)
            _, vectors = np.linalg.eigh(np.cov(y, x))
            line = np.arctan2(vectors[0, -1], vectors[1, -1])
            dy, dx = np.gradient(ndimage.gaussian_filter(image.astype(float), 1))
            grain = 0.5 * np.arctan2(2 * (dx * dy).mean(), (dx * dx - dy * dy).mean()) + np.pi / 2
            aside.append(abs((line - grain + np.pi / 2) % np.pi - np.pi / 2))
    assert len(aside) > 15
    assert min(aside) > 0.1
    assert np.mean(aside) == pytest.approx(np.pi / 4 + 0.13, abs=0.15)
