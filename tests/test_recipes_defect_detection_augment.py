"""Augmentation of batches: a row's result depends on its pixels and its seed alone, and each effect is what it says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage, stats
from torch import Tensor

from dist_train.data import mix64, row_seeds
from recipes.defect_detection.augment import _mix64, apply, draw_parameters
from recipes.defect_detection.config import AugmentConfig

OFF = {"flips": False, "turns": False, "exposure": 0.0}
ALL = AugmentConfig(flips=True, turns=True, shift_px=2, exposure=0.3, blur_px=1.2, noise=0.1)


def _seeds(count: int, first: int = 0) -> np.ndarray:
    return row_seeds(1, 0, np.arange(first, first + count))


def _images(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def _augmented(images: Tensor, config: AugmentConfig, seeds: np.ndarray | None = None) -> Tensor:
    seeds = _seeds(len(images)) if seeds is None else seeds
    return apply(images, draw_parameters(seeds, config, images.shape[2] == images.shape[3]))


def test_with_all_off_nothing_happens() -> None:
    images = _images(4, 1, 8, 8)
    assert draw_parameters(_seeds(4), AugmentConfig(**OFF), True) == {}
    assert _augmented(images, AugmentConfig(**OFF)) is images


@pytest.mark.parametrize(
    ("on", "names"),
    [
        ({"flips": True}, {"augment_flip_x", "augment_flip_y"}),
        ({"turns": True}, {"augment_turn"}),
        ({"shift_px": 2}, {"augment_shift"}),
        ({"exposure": 0.1}, {"augment_exposure"}),
        ({"blur_px": 1.0}, {"augment_blur"}),
        ({"noise": 0.1}, {"augment_noise", "augment_noise_seed"}),
    ],
)
def test_each_switch_is_an_effect_of_its_own(on: dict[str, float], names: set[str]) -> None:
    config = AugmentConfig(**{**OFF, **on})
    assert set(draw_parameters(_seeds(3), config, True)) == names
    images = _images(16, 1, 12, 12)
    before = images.clone()
    changed = _augmented(images, config)
    assert torch.equal(images, before)
    assert not torch.equal(changed, images)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 11), min_size=1, max_size=8), st.sampled_from([(9, 9), (7, 12), (16, 16)]))
def test_a_row_is_the_same_to_the_bit_in_any_batch(rows: list[int], size: tuple[int, int]) -> None:
    images, seeds = _images(12, 3, *size), _seeds(12)
    whole = _augmented(images, ALL, seeds)
    assert torch.equal(_augmented(images[rows], ALL, seeds[rows]), whole[rows])


def test_a_row_is_the_same_to_the_bit_with_more_threads_and_larger_images() -> None:
    images, seeds = _images(4, 1, 300, 300), _seeds(4)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            results.append(_augmented(images, ALL, seeds))
            results.append(torch.cat([_augmented(images[row, None], ALL, seeds[row, None]) for row in range(4)]))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


def test_other_seeds_give_other_results() -> None:
    image = _images(1, 1, 16, 16).expand(40, 1, 16, 16)
    assert len({row.numpy().tobytes() for row in _augmented(image, ALL)}) == 40


def test_turns_and_flips_are_permutations_and_all_eight_occur_alike() -> None:
    images = torch.arange(1 * 2 * 5 * 5, dtype=torch.float32).view(1, 2, 5, 5).expand(800, 2, 5, 5)
    found: dict[bytes, int] = {}
    for row in _augmented(images, AugmentConfig(exposure=0.0)):
        found[row.contiguous().numpy().tobytes()] = found.get(row.contiguous().numpy().tobytes(), 0) + 1
    image = images[0].numpy()
    expected = {
        np.ascontiguousarray(np.rot90(side, turn, axes=(1, 2))).tobytes()
        for side in (image, np.flip(image, 2))
        for turn in range(4)
    }
    assert set(found) == expected
    assert min(found.values()) > 60


def test_shifts_reach_as_far_as_asked_for_and_repeat_the_edge() -> None:
    images = _images(1, 2, 6, 9).expand(300, 2, 6, 9)
    config = AugmentConfig(**{**OFF, "shift_px": 2})
    padded = F.pad(images[:1], (2, 2, 2, 2), mode="replicate")[0]
    expected = {padded[:, y : y + 6, x : x + 9].contiguous().numpy().tobytes() for y in range(5) for x in range(5)}
    assert {row.contiguous().numpy().tobytes() for row in _augmented(images, config)} == expected


def test_turns_are_counter_clockwise_and_flips_as_named() -> None:
    images = _images(4, 3, 6, 6)
    turned = apply(images, {"augment_turn": torch.arange(4)})
    for turn in range(4):
        assert torch.equal(turned[turn], torch.rot90(images[turn], turn, (1, 2)))
    on, off = torch.ones(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
    assert torch.equal(apply(images, {"augment_flip_x": on, "augment_flip_y": off}), images.flip(3))
    assert torch.equal(apply(images, {"augment_flip_x": off, "augment_flip_y": on}), images.flip(2))
    both = apply(images, {"augment_turn": torch.arange(4), "augment_flip_x": on, "augment_flip_y": off})
    for turn in range(4):
        assert torch.equal(both[turn], torch.rot90(images[turn], turn, (1, 2)).flip(2))


def test_images_that_are_not_square_turn_by_half_turns_alone() -> None:
    images = _images(64, 1, 4, 7)
    config = AugmentConfig(flips=False, exposure=0.0)
    turns = draw_parameters(_seeds(64), config, square=False)["augment_turn"]
    assert set(turns.tolist()) == {0, 2}
    for row, turn, image in zip(_augmented(images, config), turns, images, strict=True):
        assert torch.equal(row, torch.rot90(image, int(turn), (1, 2)))


def test_exposure_changes_brightness_and_contrast_within_the_stated_share() -> None:
    images = _images(300, 1, 16, 16) * 0.1 + 0.45
    changed = _augmented(images, AugmentConfig(**{**OFF, "exposure": 0.25}))
    mean = changed.mean((1, 2, 3)) / images.mean((1, 2, 3))
    contrast = changed.std((1, 2, 3)) / images.std((1, 2, 3))
    for ratio in (mean, contrast):
        assert 1 / 1.25 - 1e-4 <= ratio.min() < 0.83
        assert 1.2 < ratio.max() <= 1.25 + 1e-4
    assert abs(np.corrcoef(mean, contrast)[0, 1]) < 0.2


def test_results_stay_in_range() -> None:
    config = AugmentConfig(exposure=0.9, noise=0.5)
    changed = _augmented(_images(16, 3, 9, 9), config)
    assert changed.min() >= 0
    assert changed.max() <= 1


@pytest.mark.parametrize("size", [(40, 40), (12, 31)])
def test_blur_is_that_of_scipy(size: tuple[int, int]) -> None:
    images, largest = _images(12, 2, *size), 2.0
    seeds = _seeds(12)
    blurred = _augmented(images, AugmentConfig(**{**OFF, "blur_px": largest}), seeds)
    kernels = draw_parameters(seeds, AugmentConfig(**{**OFF, "blur_px": largest}), True)["augment_blur"].numpy()
    for row, image, kernel in zip(blurred, images.numpy(), kernels, strict=True):
        # The ratio of two weights of a Gaussian tells its standard deviation.
        deviation = np.sqrt(0.5 / np.log(kernel[0] / kernel[1])) if kernel[1] > 0 else 0.0
        assert deviation <= largest
        expected = ndimage.gaussian_filter(image, (0, deviation, deviation), mode="nearest", truncate=4.0)
        assert np.allclose(row, expected, atol=2e-5)


def test_noise_is_standard_normal_times_the_stated_deviation() -> None:
    grey = torch.full((6, 1, 128, 128), 0.5)
    deviations = torch.tensor([0.01, 0.02, 0.04, 0.06, 0.08, 0.1])
    seeds = torch.from_numpy(mix64(np.arange(6, dtype=np.uint64)).view(np.int64))
    noisy = apply(grey, {"augment_noise": deviations, "augment_noise_seed": seeds})
    numbers = ((noisy - 0.5) / deviations[:, None, None, None]).numpy().reshape(6, -1)
    for row in numbers:
        assert abs(row.mean()) < 4 / np.sqrt(row.size)
        assert row.std() == pytest.approx(1, abs=0.02)
        assert stats.kurtosis(row) == pytest.approx(0, abs=0.15)
        assert abs(stats.skew(row)) < 0.08
        assert stats.kstest(row, "norm").pvalue > 1e-3
    # Rows, and pixels that lie beside each other, are independent.
    assert np.abs(np.corrcoef(numbers) - np.eye(6)).max() < 0.04
    for apart in (1, 2, 3, 4, 128):
        assert abs(np.mean(numbers[:, apart:] * numbers[:, :-apart])) < 0.02


def test_the_hash_of_the_noise_is_that_of_the_sampler() -> None:
    values = np.arange(-500, 500, dtype=np.int64) * 0x1234567890ABCD
    assert np.array_equal(_mix64(torch.from_numpy(values)).numpy().view(np.uint64), mix64(values.view(np.uint64)))


def test_noise_is_drawn_up_to_the_stated_deviation() -> None:
    drawn = draw_parameters(_seeds(500), AugmentConfig(**{**OFF, "noise": 0.2}), True)["augment_noise"]
    assert drawn.min() >= 0
    assert drawn.max() <= 0.2
    assert drawn.mean() == pytest.approx(0.1, rel=0.1)
