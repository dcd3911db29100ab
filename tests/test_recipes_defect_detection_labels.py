"""Labels, targets and kinds of defect of prepared images, and what is refused of them before any image is read."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from dist_train.errors import ConfigError, DataError
from recipes.defect_detection import data as prepared_data
from recipes.defect_detection import one_class
from recipes.defect_detection.predictions import read_header
from tests.pictures import config_of, prepare_images, write_classes, write_image, write_mask, write_table

SPLITS = ("train", "validation", "test")


def test_probabilities_are_targets_as_they_are(tmp_path: Path) -> None:
    shares = [0.0, 1 / 3, 2 / 3, 1.0]
    rows = []
    for index in range(40):
        write_image(tmp_path / f"{index}.png", index)
        rows.append({"file": f"{index}.png", "p": shares[index % 4]})
    table = write_table(tmp_path / "t.csv", rows)
    stored, facts = prepare_images(tmp_path / "cache", path=table, label_column="p", labels_are="probabilities")
    np.testing.assert_allclose(stored.targets[:4], [[1 - share, share] for share in shares], rtol=1e-6)
    assert stored.labels[:4].tolist() == [0, 0, 1, 1]
    assert facts["types"] == ["defective"]
    higher = {"labels_are": "probabilities", "defective_from": 0.7}
    stored, _ = prepare_images(tmp_path / "cache", path=table, label_column="p", **higher)
    assert stored.labels[:4].tolist() == [0, 0, 0, 1]
    with pytest.raises(ConfigError, match=r"look like probabilities .* data\.labels_are=probabilities"):
        prepare_images(tmp_path / "cache", path=table, label_column="p")


def test_good_parts_are_found_by_their_usual_names_or_asked_for(tmp_path: Path) -> None:
    for name in ("OK", "Defect-free", "normal", "No Defect"):
        parts = write_classes(tmp_path / name, {name: 6, "dent": 3})
        if name == "Defect-free":
            with pytest.raises(ConfigError, match=r"there are: 'Defect-free', 'dent'.\nName it with data\.good_label"):
                prepare_images(tmp_path / "cache", path=parts)
        _, facts = prepare_images(tmp_path / "cache", path=parts, good_label=name if name == "Defect-free" else None)
        assert facts["good"] == name
        assert facts["labels"] == ["good", "defective"]
    both = write_classes(tmp_path / "both", {"good": 4, "ok": 4, "dent": 4})
    with pytest.raises(ConfigError, match="several classes are called like good parts: 'good', 'ok'"):
        prepare_images(tmp_path / "cache", path=both)
    with pytest.raises(
        ConfigError, match=r"data\.good_label is 'fine', but no image is of this class; there are: 'dent'"
    ):
        prepare_images(tmp_path / "cache", path=both, good_label="fine")


def test_classes_are_sorted_behind_the_good_one(tmp_path: Path) -> None:
    parts = write_classes(tmp_path / "parts", {"good": 6, "a": 3, "z": 3})
    stored, facts = prepare_images(tmp_path / "cache", path=parts, target="classes")
    assert facts["labels"] == ["good", "a", "z"]
    assert set(stored.table["type"].to_pylist()) == {"", "a", "z"}
    for name in SPLITS:
        assert min(facts["splits"][name]["labels"].values()) >= 1
    shutil.rmtree(parts / "good")
    _, facts = prepare_images(tmp_path / "cache", path=parts, target="classes")
    assert facts["labels"] == ["a", "z"]
    assert facts["good"] is None


def test_classes_that_are_called_good_and_defective_are_classes(tmp_path: Path) -> None:
    parts = write_classes(tmp_path / "parts", {"good": 6, "defective": 6})
    for target in ("classes", "defective"):
        _, facts = prepare_images(tmp_path / "cache", path=parts, target=target)
        assert facts["labels"] == ["good", "defective"]
        assert read_header(facts).is_binary == (target == "defective")
        assert read_header(facts).good == 0


def test_a_class_that_cannot_lie_in_all_splits_is_refused_but_a_kind_of_defect_may(tmp_path: Path) -> None:
    parts = write_classes(tmp_path / "parts", {"good": 12, "dent": 6, "crack": 2})
    with pytest.raises(DataError, match=r"class 'crack' has 2 image\(s\), of which none lies in the validation split"):
        prepare_images(tmp_path / "cache", path=parts, target="classes")
    _, facts = prepare_images(tmp_path / "cache", path=parts)
    assert facts["types"] == ["crack", "dent"]
    with pytest.raises(DataError, match=r"all images are of the class 'good', but data\.target is classes"):
        prepare_images(tmp_path / "cache", path=write_classes(tmp_path / "one", {"good": 5}), target="classes")
    few = write_classes(tmp_path / "few", {"good": 2, "dent": 5})
    with pytest.raises(DataError, match="the class 'good' has 2"):
        prepare_images(tmp_path / "cache", path=few)


def test_good_parts_alone_are_no_error_unless_a_classifier_is_asked_for(tmp_path: Path) -> None:
    parts = write_classes(tmp_path / "parts", {"good": 12})
    _, facts = prepare_images(tmp_path / "cache", path=parts)
    assert facts["splits"]["train"]["labels"] == {"good": 7, "defective": 0}
    assert any("no image is defective" in warning for warning in facts["warnings"])
    for task, augment, refused in (
        ({"mode": "classifier"}, {}, True),
        ({"mode": "classifier"}, {"scratches": 0.2}, False),
        ({"mode": "one_class"}, {}, False),
    ):
        config = config_of(tmp_path / "cache", {"task": task, "augment": augment}, path=parts)
        if refused:
            with pytest.raises(ConfigError, match=r"task\.mode is classifier, .* augment\.scratches=0\.2"):
                prepared_data.check_mode(config, facts)
        else:
            prepared_data.check_mode(config, facts)


def test_kinds_of_test_only_are_never_seen_in_training(tmp_path: Path) -> None:
    parts = write_classes(tmp_path / "parts", {"good": 20, "dent": 10, "crack": 10})
    _, facts = prepare_images(tmp_path / "cache", path=parts, test_only=["crack"])
    kinds = {name: facts["splits"][name]["types"] for name in SPLITS}
    assert kinds["test"]["crack"] == 10
    assert set(kinds["train"]) == set(kinds["validation"]) == {"dent"}
    assert facts["splits"]["train"]["labels"]["good"] == 12
    _, facts = prepare_images(tmp_path / "cache", path=parts, test_only=["all"])
    assert facts["splits"]["test"]["types"] == {"crack": 10, "dent": 10}
    assert facts["splits"]["train"]["types"] == facts["splits"]["validation"]["types"] == {}
    with pytest.raises(ConfigError, match=r"no such kind of defect; there are: 'crack', 'dent'"):
        prepare_images(tmp_path / "cache", path=parts, test_only=["scratch"])
    with pytest.raises(ConfigError, match="a class that is not trained cannot be told"):
        prepare_images(tmp_path / "cache", path=parts, test_only=["crack"], target="classes")


def test_defects_that_the_resizing_makes_too_small_are_told(tmp_path: Path) -> None:
    for index in range(12):
        write_image(tmp_path / "parts" / "dent" / f"{index}.png", index, 96, 96)
        size = 30 if index else 6
        write_mask(tmp_path / "masks" / "dent" / f"{index}.png", [(2, 2, size, size), (60, 60, 90, 90)], 96, 96)
        write_image(tmp_path / "parts" / "good" / f"{index}.png", 50 + index, 96, 96)
    given = {"path": tmp_path / "parts", "mask_path": tmp_path / "masks"}
    _, facts = prepare_images(tmp_path / "cache", **given)
    (warning,) = facts["warnings"]
    assert re.search(
        r"1 of 12 images with marked defects have one of fewer than 4 pixels at 24x24; the smallest has 1, in "
        r"dent/0\.png, which is 96x96\..*data\.size_px.*model\.tile_px",
        warning,
    )
    _, facts = prepare_images(tmp_path / "cache", **given, size_px=48)
    assert facts["warnings"] == []


def test_too_few_good_parts_for_the_one_class_thresholds_are_told(tmp_path: Path) -> None:
    parts = write_classes(tmp_path / "parts", {"good": 20, "dent": 6})
    _, facts = prepare_images(tmp_path / "cache", path=parts)
    assert not any("198" in warning for warning in facts["warnings"])
    said: list[str] = []
    _, facts = prepare_images(tmp_path / "cache", said, path=parts, test_only=["all"])
    count = facts["splits"]["validation"]["rows"]
    expected = f"the validation split has {count} good images; where .* 198 are needed for thresholds that reject 1%"
    assert any(re.match(expected, warning) for warning in facts["warnings"])
    assert any(re.search(expected, line) for line in said)


def test_so_many_good_parts_as_are_asked_for_keep_the_stated_share_of_rejects() -> None:
    assert one_class.few_parts(198) is None
    assert one_class.few_parts(197) is not None
    generator = np.random.default_rng(0)
    rejected = []
    for _ in range(40):
        features = generator.normal(size=(198, 4))
        gaussian = one_class.calibrate(features, np.ones(198, dtype=bool))["gaussian"]
        rejected.append((one_class.probability(generator.normal(size=(2000, 4)), gaussian)[:, 1] >= 0.5).mean())
    assert np.mean(rejected) <= 0.013
