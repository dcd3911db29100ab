"""The classical baseline: it learns from what the model may, and from all of the rare classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dist_train.prepared import prepare
from recipes.defect_detection import score, texture_baseline
from recipes.defect_detection.predictions import header_of, probabilities
from recipes.defect_detection.stored import StoredImages, open_images
from recipes.defect_detection.texture_store import compute_textures, features_of
from tests.pictures import RECIPE, config_of

SYNTHETIC = {"path": "synthetic", "images": 200, "synthetic": {"defective_share": 0.15}}


def test_the_commonest_classes_are_thinned_and_no_rare_one_is() -> None:
    labels = np.repeat([0, 1, 2, 3], [5000, 3, 40, 900])
    labels = labels[np.random.default_rng(0).permutation(len(labels))]
    rows = np.arange(100, 100 + len(labels))
    for most, expected in ((10_000, [5000, 3, 40, 900]), (2000, [1057, 3, 40, 900]), (1000, [478, 3, 40, 478])):
        kept = texture_baseline.at_most(rows, labels, most)
        assert np.bincount(labels[kept - 100]).tolist() == expected
        assert (np.diff(kept) > 0).all()


def test_a_baseline_that_saw_fewer_good_parts_answers_by_the_shares_that_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = prepare(config_of(tmp_path, **SYNTHETIC), RECIPE, lambda text: None)
    whole = texture_baseline.train(prepared, one_class=False)
    monkeypatch.setattr(texture_baseline, "_MOST_ROWS", 36)
    thinned = texture_baseline.train(prepared, one_class=False)
    rows = StoredImages(prepared).rows("train")
    share = StoredImages(prepared).labels[rows].mean()
    for tables in (whole, thinned):
        assert probabilities(tables["majority", "test"])[:, 1] == pytest.approx(share)
    assert probabilities(thinned["texture", "test"])[:, 1].mean() == pytest.approx(share, abs=0.12)


def test_where_the_model_learns_from_good_parts_alone_so_does_the_baseline(tmp_path: Path) -> None:
    for mode, one_class in (("classifier", False), ("one_class", True)):
        config = config_of(tmp_path, {"task": {"mode": mode}}, **SYNTHETIC)
        prepared = prepare(config, RECIPE, lambda text: None)
        tables = score.baselines(prepared, config, lambda text: None)
        assert header_of(tables["texture"]["test"]).one_class == one_class


def test_a_worker_opens_the_images_of_a_folder_once_and_the_command_keeps_none_open(tmp_path: Path) -> None:
    prepared = prepare(config_of(tmp_path, **SYNTHETIC), RECIPE, lambda text: None)
    open_images.cache_clear()
    for first in (0, 64, 128):
        assert len(features_of(prepared, np.arange(first, first + 2))) == 2
    assert (open_images.cache_info().misses, open_images.cache_info().hits) == (1, 2)
    compute_textures(prepared, np.arange(3), lambda text: None)
    assert open_images.cache_info().currsize == 0
