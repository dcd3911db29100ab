"""The task of defect detection: shipped files train, examples are a function of their seed, labels fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import ResNetConfig, ResNetModel

from dist_train import config_io
from dist_train.ablation import parse_ladder
from dist_train.data import row_seeds
from dist_train.errors import ConfigError, DataError
from dist_train.model_folder import write_model, write_record
from dist_train.predict import Predictor
from dist_train.prepared import prepare
from dist_train.recipe import list_recipes, load_recipe
from recipes.defect_detection.data import epoch_rows
from recipes.defect_detection.losses import cross_entropy
from recipes.defect_detection.networks import build_backbone
from recipes.defect_detection.task import DefectTask
from recipes.defect_detection.texture import texture_features
from tests.parts import SETTINGS, SIDE, write_parts
from tests.pictures import pixels, write_image
from tests.ranks import run_ranks
from tests.recipe_steps import take_steps

SHIPPED = [recipe.name for recipe in list_recipes() if recipe.name.startswith("defect_detection")]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("parts")
    write_parts(folder / "parts", 120)
    placed = [word.replace("=parts/", f"={folder}/parts/") for word in SETTINGS]
    return [*placed, f"data.cache_dir={folder}/prepared", "track.wandb=disabled"]


def _task(words: list[str], *more: str, name: str = "defect_detection") -> DefectTask:
    config: Any = config_io.load(name, [*words, *more], site=False).config
    recipe = load_recipe(config.recipe)
    task: DefectTask = recipe.make_task(config, prepare(config, recipe, lambda text: None))
    return task


def _batch(task: DefectTask, places: list[int], epoch: int = 0) -> dict[str, torch.Tensor]:
    rows = task.rows("train")
    return task.collate(rows.take(np.array(places)), row_seeds(0, epoch, rows.ids[places]))


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_recipe_file_takes_steps(words: list[str], tmp_path: Path, name: str) -> None:
    settings = [*words, "data.path=synthetic", "data.mask_path=null", "data.images=150", "train.epochs=null"]
    settings += ["train.steps=2", "data.synthetic.defective_share=0.3", "train.precision=fp32"]
    if name.endswith("finetune"):
        small = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
        ResNetModel(small).save_pretrained(tmp_path / "hub")
        settings += [f"model.pretrained={tmp_path}/hub"]
    losses, _ = run_ranks(1, take_steps, name, settings, "single", 1, str(tmp_path))[0]
    assert len(losses) == 2
    assert np.isfinite(losses).all()


def test_every_rung_of_a_shipped_ladder_is_another_training() -> None:
    for name in SHIPPED:
        rungs = parse_ladder(config_io.load(name, [], site=False).config)
        configs = [config_io.load(name, [*rung.settings], site=False).config for rung in rungs]
        assert len({config_io.result_fingerprint(config) for config in configs}) == len(rungs), name


def test_the_large_variant_has_the_parameters_that_it_states() -> None:
    model: Any = config_io.load("defect_detection/large", [], site=False).config.model
    with torch.device("meta"):
        backbone = build_backbone(model.kind, 3, model.widths, model.depths, model.stem_stride)
    assert sum(parameter.numel() for parameter in backbone.parameters()) == pytest.approx(196e6, rel=0.01)


def test_an_image_is_changed_by_its_seed_alone_whatever_lies_beside_it(words: list[str]) -> None:
    task = _task(words, "augment.scratches=0.3", "augment.paste=0.3", "augment.mixup=0.4", "augment.noise=0.05")
    together = _batch(task, list(range(24)))
    alone = _batch(task, [17])
    for name, tensor in alone.items():
        assert torch.equal(tensor[0], together[name][17]), name
    other = _batch(task, list(range(24)), epoch=1)
    assert not torch.equal(other["image"], together["image"])
    targets = together["target"]
    torch.testing.assert_close(targets.sum(1), torch.ones(24))
    assert ((targets > 0) & (targets < 1)).any(), "a blend has a target between"


def test_a_good_part_that_gets_a_defect_counts_as_defective_and_no_other_split_is_changed(words: list[str]) -> None:
    task, plain = _task(words, "augment.scratches=0.9"), _task(words)
    places = list(range(40))
    changed, before = _batch(task, places), _batch(plain, places)
    made = (changed["target"][:, 1] == 1) & (before["target"][:, 1] == 0)
    assert made.sum() > 0.6 * (before["target"][:, 0] == 1).sum()
    differs = (changed["image"] != before["image"]).flatten(1).any(1)
    assert torch.equal(differs, made)
    rows = task.rows("test")
    seeds = np.arange(10, dtype=np.uint64)
    test = task.collate(rows.take(np.arange(10)), seeds)
    assert not [name for name in test if name.startswith("augment")]
    assert torch.equal(test["image"], plain.collate(plain.rows("test").take(np.arange(10)), seeds)["image"])


def test_the_class_shares_that_the_model_learns_count_repetitions_and_made_defects(words: list[str]) -> None:
    task = _task(words, "task.balanced_share=0.9", "augment.scratches=0.5", "task.logit_adjustment=1")
    rows = task.rows("train")
    targets = np.stack([example.target for example in rows.take(np.arange(len(rows.ids)))])
    good, defective = targets.sum(0)
    assert defective >= 0.9 * good
    expected = np.array([good / 2, defective + good / 2]) / len(targets)
    np.testing.assert_allclose(task._sampled_shares(), expected, atol=0.01)
    model = task.build_model()
    np.testing.assert_allclose(model.adjustment, np.log(expected), atol=0.02)
    own = np.array([task.facts["splits"]["train"]["labels"][name] for name in task.labels], dtype=float)
    np.testing.assert_allclose(model.correction, np.log(own / own.sum()), atol=0.02)


def test_the_plan_counts_the_images_that_an_epoch_really_shows(words: list[str]) -> None:
    for more in ([], ["task.balanced_share=0.5"], ["task.mode=one_class"]):
        task = _task(words, *more)
        assert epoch_rows(task.config, task.facts) == len(task.rows("train").ids), more


def test_in_one_class_mode_no_defective_image_is_trained_on(words: list[str]) -> None:
    task = _task(words, "task.mode=one_class")
    rows = task.rows("train")
    assert all(example.target[0] == 1 for example in rows.take(np.arange(len(rows.ids))))
    assert (_batch(task, list(range(40)))["target"][:, 1] == 1).any(), "but defects are drawn"


def test_a_classifier_without_any_defect_to_learn_from_says_what_to_do(words: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"Set task\.mode to auto or one_class"):
        _task(words, "data.test_only=[all]", "task.mode=classifier")
    assert _task(words, "data.test_only=[all]").is_one_class


def test_defects_cannot_be_pasted_where_no_mask_shows_one(words: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"augment.paste is 0.2, but no image has a mask"):
        _task(words, "data.mask_path=null", "augment.paste=0.2")


def test_eight_images_are_learnt_by_heart(words: list[str]) -> None:
    task = _task(words, "augment.flips=false", "augment.turns=false", "augment.exposure=0")
    torch.manual_seed(0)
    model = task.build_model()
    labels = np.array([example.target[1] for example in task.rows("train").take(np.arange(60))])
    places = [*np.flatnonzero(labels == 0)[:4].tolist(), *np.flatnonzero(labels == 1)[:4].tolist()]
    batch = {**_batch(task, places), "weight": torch.ones(8)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss = model.train()(batch)
        loss.backward()
        optimizer.step()
    assert loss.item() / 8 < 0.05


def test_the_model_of_a_recipe_is_measured_under_fake_tensors(words: list[str]) -> None:
    from dist_train.activation_profile import measure

    for more in ([], ["model.tile_px=16"], ["model.kind=convnext"], ["model.texture=true"]):
        task = _task(words, *more)
        length = int(task.rows("train").lengths[0])
        profile = measure(task, "bf16", False, (length, length), task.config.optim)
        assert profile.method == "fake tensors", more


def test_texture_features_follow_the_image_that_they_are_of(words: list[str]) -> None:
    task = _task(words, "model.texture=true", "augment.scratches=0.5")
    batch = _batch(task, list(range(30)))
    for image, texture in zip(batch["image"].numpy(), batch["texture"].numpy(), strict=True):
        np.testing.assert_allclose(texture, texture_features(image), rtol=1e-5, atol=1e-6)
    rows = task.rows("test/blur-2")
    blurred = task.collate(rows.take(np.arange(3)), np.arange(3, dtype=np.uint64))
    np.testing.assert_allclose(
        blurred["texture"][1], texture_features(blurred["image"][1].numpy()), rtol=1e-5, atol=1e-6
    )
    pixels = task.rows("test").take(np.array([1]))[0]
    new = task.collate(task.encode([{"image": pixels.image[0]}]).rows, np.zeros(1, dtype=np.uint64))
    np.testing.assert_allclose(new["texture"][0], pixels.texture, rtol=1e-5, atol=1e-6)


def test_texture_features_alone_can_decide(words: list[str]) -> None:
    task = _task(words, "model.texture=true")
    torch.manual_seed(0)
    head = task.build_model().texture
    batch = _batch(task, list(range(60)))
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    losses = []
    for _ in range(80):
        optimizer.zero_grad()
        loss = cross_entropy(head.train()(batch["texture"]), batch["target"]).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_the_column_that_the_training_read_names_the_image_whatever_else_a_row_has(
    words: list[str], tmp_path: Path
) -> None:
    task = _task(words, "data.file_column=shot")
    for seed in (0, 1):
        write_image(tmp_path / f"{seed}.png", seed, SIDE, SIDE)
    shot, other = (str(tmp_path / f"{seed}.png") for seed in (0, 1))
    rows = task.encode([{"path": other, "image": other, "shot": shot}, {"image": other}, {"path": other, "shot": None}])
    assert (rows.rows[0].image[0] == pixels(0, SIDE, SIDE)).all()
    assert (rows.rows[1].image[0] == pixels(1, SIDE, SIDE)).all()
    assert (rows.rows[2].image[0] == pixels(1, SIDE, SIDE)).all()
    with pytest.raises(DataError, match="names no image"):
        task.encode([{"shot": " "}])
    with pytest.raises(KeyError, match="shot"):
        task.encode([{"id": "7"}])


def test_predicting_holds_few_large_images_at_once(words: list[str], tmp_path: Path) -> None:
    task = _task(words)
    write_model(tmp_path, task, task.build_model())
    decision = {"temperature": 1.0, "flag_from": 0.5, "accept_below": 0.5, "reject_from": 0.5}
    record = {"run": "small", "decision": decision, "precision": "fp32"}
    write_record(tmp_path, task.config, task.facts, record)
    predictor = Predictor(tmp_path, "cpu")
    assert predictor.chunk_rows == 2048
    frames = [{"image": pixels(seed, SIDE, SIDE)} for seed in range(3)]
    assert [set(answer) >= {"decision", "probability"} for answer in predictor.predict(frames)] == [True] * 3
    write_record(tmp_path, task.config, {**task.facts, "size": [2048, 2048]}, record)
    assert Predictor(tmp_path, "cpu").chunk_rows == 16  # 64 MiB


def test_a_peak_is_told_in_the_pixels_of_the_frame_and_never_beside_it(words: list[str]) -> None:
    task = _task(words)
    frame = np.zeros((SIDE, 4 * SIDE), dtype=np.uint8)  # above and below it the network sees a border
    (example,) = task.encode([{"image": frame}]).take(np.array([0]))
    outputs = {
        "probability": np.full((3, 2), 0.5, dtype=np.float32),
        "peak": np.array([[0.5, 0.25], [0.1, 0.0], [0.9, 1.0]]),
        "place": np.tile(np.array(example.place, dtype=np.float32), (3, 1)),
    }
    decision = {"temperature": 1.0, "flag_from": 0.5, "accept_below": 0.5, "reject_from": 0.5}
    answers = task.answers(outputs, decision)
    np.testing.assert_allclose(answers["peak_y"], [SIDE / 2, 0, SIDE], atol=0.01)
    np.testing.assert_allclose(answers["peak_x"], [SIDE, 0, 4 * SIDE], atol=0.01)
