"""The module of defect detection: heat maps add up to the decision, tiles see small defects, losses are the papers'."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from recipes.defect_detection import losses
from recipes.defect_detection.model import (
    HEAT_SIDE,
    DefectClassifier,
    DefectNetwork,
    TextureHead,
    Tiles,
    peak,
    spread,
    tile_starts,
)
from recipes.defect_detection.sampling import logit_adjustment, prior_correction, repeated_rows


class Brightness(nn.Module):
    """A backbone whose features are the means of 4 x 4 pixels, and their opposites."""

    out_channels, stride, middle = 2, 4, 2.0

    def forward(self, images: Tensor) -> Tensor:
        means = F.avg_pool2d(images, 4)
        return torch.cat([means, -means], 1)


def _network(good: int | None = 0, num_classes: int = 2, tiles: Tiles | None = None) -> DefectNetwork:
    network = DefectNetwork(Brightness(), num_classes, good, [0.0], [1.0], tiles=tiles).eval()
    nn.init.zeros_(network.head.weight)
    with torch.no_grad():
        network.head.weight[1, 0] = 1.0  # bright places speak for class 1
    return network


def test_the_heat_map_adds_up_to_the_decision() -> None:
    images = torch.rand(3, 1, 16, 24)
    logits, heat, _ = _network()(images)
    torch.testing.assert_close(heat.mean((1, 2)), logits[:, 1] - logits[:, 0])
    assert heat.shape == (3, 4, 6)


def test_a_small_share_of_the_places_decides_where_it_is_asked_for() -> None:
    images = torch.zeros(1, 1, 32, 32)
    images[0, 0, :4, :8] = 1.0  # two of 64 places
    whole, top = _network(), _network()
    top.top_share = 2 / 64
    assert whole(images)[0][0, 1].item() == pytest.approx(2 / 64)
    assert top(images)[0][0, 1].item() == pytest.approx(1.0)
    one = _network()
    one.top_share = 0.001
    assert one(images)[0][0, 1].item() == pytest.approx(1.0), "at least one place"


def test_how_bright_and_how_rough_a_part_is_does_not_count_where_images_are_standardised() -> None:
    torch.manual_seed(0)
    network = _network()
    network.standardise = True
    images = torch.rand(2, 1, 16, 24)
    logits = network(images)[0]
    torch.testing.assert_close(network(0.2 + 0.5 * images)[0], logits)
    torch.testing.assert_close(network(images[1:])[0], logits[1:], rtol=0, atol=0)
    assert network(torch.full((1, 1, 16, 24), 0.3))[0].abs().max() < 1e-5, "a part of one brightness has no deviation"


def test_the_peak_lies_where_the_defect_is() -> None:
    images = torch.zeros(2, 1, 32, 64)
    images[0, 0, 4:8, 40:44] = 1.0
    images[1, 0, 28:32, 0:4] = 1.0
    _, heat, _ = _network()(images)
    np.testing.assert_allclose(peak(20 * heat, 4, 2.0).detach(), [[6.0, 42.0], [30.0, 2.0]], atol=1e-4)


def test_the_peak_lies_between_places_that_are_as_hot() -> None:
    heat = torch.full((3, 6, 6), -50.0)
    heat[0, 2, 3] = heat[0, 2, 4] = 5.0
    heat[1, 0, 5] = heat[1, 1, 5] = 5.0
    heat[1, 3, 5] = 4.0  # no neighbour of the hottest
    heat[2] = 5.0
    np.testing.assert_allclose(peak(heat, 8, 0.5), [[16.5, 28.5], [4.5, 40.5], [4.5, 4.5]], atol=1e-4)


def test_without_a_good_class_the_heat_map_is_of_the_predicted_class() -> None:
    network = _network(good=None, num_classes=3)
    with torch.no_grad():
        network.head.weight[2, 1] = 1.0  # dark places speak for class 2
    images = torch.zeros(1, 1, 8, 8)
    images[0, 0, :4] = -1.0
    logits, heat, _ = network(images)
    assert logits.argmax(1).item() == 2
    torch.testing.assert_close(heat[0], torch.tensor([[1.0, 1.0], [0.0, 0.0]]))


def test_a_kept_heat_map_lies_over_its_image() -> None:
    """Whatever the stride, and where the first place lies: the hottest cell is where the peak is."""
    for stride, middle, (height, width), (y, x) in [
        (4, 2.0, (96, 128), (5, 20)),
        (32, 0.5, (150, 150), (1, 3)),
        (8, 0.5, (128, 128), (15, 15)),
        (2, 1.0, (200, 400), (97, 3)),
    ]:
        heat = torch.zeros(1, -(-height // stride), -(-width // stride))
        heat[0, y, x] = 1.0
        kept = spread(heat, stride, middle, height, width)
        cell = max(height, width) / HEAT_SIDE
        assert kept.shape == (1, round(height / cell), round(width / cell))
        hottest = np.array(np.unravel_index(int(kept.argmax()), kept.shape[1:]))
        np.testing.assert_allclose((hottest + 0.5) * cell, [y * stride + middle, x * stride + middle], atol=cell)
        assert kept.max() > 0.5


@pytest.mark.parametrize("length", [32, 33, 64, 100, 101])
def test_tiles_cover_every_pixel_and_overlap_as_stated(length: int) -> None:
    tiles = Tiles(32, 0.25, 1)
    starts = tile_starts(length, tiles, 4)
    seen = np.zeros(length)
    for start in starts:
        assert 0 <= start <= max(0, length - 32)
        seen[start : start + 32] += 1
    assert (seen > 0).all()
    assert all(later - earlier <= 24 for earlier, later in itertools.pairwise(starts))


def test_a_small_defect_in_a_large_frame_moves_the_score_more_with_tiles() -> None:
    images = torch.zeros(2, 1, 128, 128)
    images[1, 0, 72:80, 20:28] = 1.0
    whole, _, _ = _network()(images)
    tiled, heat, _ = _network(tiles=Tiles(32, 0.25, 2))(images)
    rise = [(logits[1, 1] - logits[0, 1]).item() for logits in (whole, tiled)]
    assert rise[1] > 8 * rise[0]
    assert heat.shape == (2, 32, 32)
    y, x = peak(heat, 4, 2.0)[1].tolist()
    assert 72 <= y < 80
    assert 20 <= x < 28


def test_one_tile_alone_does_not_decide() -> None:
    images = torch.zeros(1, 1, 64, 64)
    images[0, 0, :8, :8] = 1.0
    one, two = (_network(tiles=Tiles(16, 0.0, top))(images)[0][0, 1].item() for top in (1, 2))
    assert two == pytest.approx(one / 2)


def test_cross_entropy_and_focal_loss_are_those_of_the_papers() -> None:
    logits, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, 2, 1, 0])
    target = F.one_hot(labels, 3).float()
    torch.testing.assert_close(losses.cross_entropy(logits, target), F.cross_entropy(logits, labels, reduction="none"))
    torch.testing.assert_close(losses.focal(logits, target, 0.0), losses.cross_entropy(logits, target))
    chosen = logits.softmax(1)[torch.arange(6), labels]
    torch.testing.assert_close(losses.focal(logits, target, 2.0), -((1 - chosen) ** 2) * chosen.log())


def test_a_soft_target_is_best_met_by_its_own_probability() -> None:
    target = torch.tensor([[0.7, 0.3]])
    for loss in (losses.cross_entropy, lambda logits, soft: losses.focal(logits, soft, 2.0)):
        shares = torch.linspace(0.01, 0.99, 99)
        values = [loss(torch.tensor([[p, 1 - p]]).log(), target).item() for p in shares.tolist()]
        assert shares[int(np.argmin(values))].item() == pytest.approx(0.7, abs=0.011)
    torch.testing.assert_close(losses.smooth(target, 0.1), torch.tensor([[0.68, 0.32]]))


def _batch(count: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "image": torch.randint(0, 256, (count, 1, 16, 16), generator=generator, dtype=torch.uint8),
        "target": F.one_hot(torch.arange(count) % 2, 2).float(),
        "readable": torch.ones(count),
        "weight": torch.ones(count),
    }


def test_an_image_that_cannot_be_read_counts_nothing_in_the_loss() -> None:
    model, batch = DefectClassifier([_network()]).train(), _batch()
    others = {name: value[1:] for name, value in batch.items()}
    batch["readable"][0] = 0.0
    torch.testing.assert_close(model(batch), model(others))


def test_the_adjusted_logits_train_and_the_corrected_ones_answer() -> None:
    batch = _batch()
    plain, moved = (
        DefectClassifier([_network()]),
        DefectClassifier([_network()], adjustment=[0.0, 2.0], correction=[0.0, 1.0]),
    )
    assert moved.train()(batch) != plain.train()(batch)
    logits, _, _ = plain.networks[0](batch["image"].float() / 255)
    expected = (logits + torch.tensor([0.0, 1.0])).softmax(1)
    torch.testing.assert_close(moved.eval()(batch)["probability"], expected)


def test_the_members_learn_each_by_its_own_loss_and_answer_by_the_mean_of_their_logits() -> None:
    batch = {**_batch(), "texture": torch.randn(4, 3, generator=torch.Generator().manual_seed(1))}
    texture = TextureHead([0.0] * 3, [1.0] * 3, 2)
    nn.init.normal_(texture.out.weight)
    other = _network()
    nn.init.constant_(other.head.weight, 3.0)
    alone = [DefectClassifier([network]) for network in (_network(), other)]
    model = DefectClassifier([_network(), other], texture=texture).eval()
    logits = [*(each.networks[0](batch["image"] / 255)[0] for each in alone), texture(batch["texture"])]
    answers = model(batch)
    torch.testing.assert_close(answers["probability"], torch.stack(logits).mean(0).softmax(1))
    heats = torch.stack([each.eval()(batch)["heat"] for each in alone])
    torch.testing.assert_close(answers["heat"], heats.mean(0))
    model.train()
    texture.eval()  # its dropout would draw
    own = sum(losses.cross_entropy(each, batch["target"]).sum() for each in logits) / 3
    torch.testing.assert_close(model(batch), own)


def test_adjusting_and_correcting_give_the_probabilities_of_the_wanted_shares() -> None:
    """A model that has learnt log-likelihoods alone: with logits adjusted by all of the log shares."""
    sampled, wanted = np.array([0.5, 0.5]), np.array([0.9, 0.1])
    likelihood = np.array([[0.2, 0.6], [0.4, 0.1]])
    for strength in (0.0, 0.5, 1.0):
        learnt = np.log(likelihood * sampled) - logit_adjustment(sampled, strength)
        answered = learnt + prior_correction(sampled, wanted, strength)
        posterior = np.exp(answered) / np.exp(answered).sum(1, keepdims=True)
        expected = likelihood * wanted / (likelihood * wanted).sum(1, keepdims=True)
        np.testing.assert_allclose(posterior, expected)


def test_rarer_classes_come_again_until_they_have_their_share() -> None:
    rows, labels = np.arange(100, 200), np.repeat([0, 1, 2], [70, 20, 10])
    chosen, ids = repeated_rows(rows, labels, 0.5)
    counts = np.bincount(labels[chosen - 100])
    assert counts.tolist() == [70, 35, 35]
    assert len(np.unique(ids)) == len(ids), "each repetition is augmented in its own way"
    each = np.bincount(chosen - 100, minlength=100)
    assert set(each[90:]) == {3, 4}, "as evenly as can be"
    assert repeated_rows(rows, labels, None)[0].tolist() == rows.tolist()
    assert [part.tolist() for part in repeated_rows(rows, labels, 0.5)] == [chosen.tolist(), ids.tolist()]


class _Cells(nn.Module):
    """A place for each `stride` pixels, the last one of which may lack some."""

    def __init__(self, stride: int, rounds_up: bool) -> None:
        super().__init__()
        self.out_channels, self.stride, self.middle, self.rounds_up = 1, stride, stride / 2, rounds_up

    def forward(self, images: Tensor) -> Tensor:
        return F.avg_pool2d(images, self.stride, ceil_mode=self.rounds_up)


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(16, 90), st.integers(16, 90)),
    tile=st.integers(16, 64),
    overlap=st.sampled_from([0.0, 0.25, 0.6, 0.75]),
    stride=st.sampled_from([1, 2, 4, 8, 16]),
    rounds_up=st.booleans(),
)
def test_tiles_of_any_size_leave_no_cell_of_the_heat_map_empty(
    size: tuple[int, int], tile: int, overlap: float, stride: int, rounds_up: bool
) -> None:
    network = DefectNetwork(_Cells(stride, rounds_up), 2, 0, [0.5], [0.2], tiles=Tiles(tile, overlap, 2)).eval()
    with torch.no_grad():
        _, heat, _ = network(torch.rand(1, 1, *size))
    assert heat.abs().max() < 1e3
