"""Hugging Face image models as backbones: their feature maps, their frozen batch statistics, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from dist_train.errors import ConfigError, DataError, UnsafeInputError
from dist_train.parity import has_batch_statistics
from dist_train.prepared import load_facts, prepare
from recipes.defect_detection.config import Config
from recipes.defect_detection.pretrained import CONFIG_FILE, PretrainedBackbone, build_pretrained, save_config
from tests.hub_server import serving
from tests.pictures import RECIPE, config_of

MODELS: dict[str, Any] = {
    "resnet": lambda: transformers.ResNetModel(
        transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 24], depths=[1, 1, 1], layer_type="basic")
    ),
    "convnextv2": lambda: transformers.ConvNextV2Model(
        transformers.ConvNextV2Config(hidden_sizes=[8, 16, 24], depths=[1, 1, 2], num_stages=3)
    ),
    "vit": lambda: transformers.ViTModel(
        transformers.ViTConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=64,
            patch_size=8,
        )
    ),
    "swin": lambda: transformers.SwinModel(
        transformers.SwinConfig(
            image_size=64, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4
        )
    ),
}


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hub") / request.param
    torch.manual_seed(0)
    MODELS[request.param]().save_pretrained(path)
    return path


def _config(folder: Path, size_px: int = 64) -> Config:
    return Config(recipe="defect_detection", model={"pretrained": str(folder)}, data={"size_px": size_px})  # type: ignore[arg-type]


def test_any_model_gives_a_map_of_features_from_grey_or_colour(folder: Path) -> None:
    backbone = build_pretrained(_config(folder), folder, {}).eval()
    with torch.no_grad():
        grey = backbone(torch.rand(2, 1, 64, 64))
    side = 64 // backbone.stride
    assert grey.shape == (2, backbone.out_channels, side, side)


def test_a_model_whose_config_names_no_width_shows_it(tmp_path: Path) -> None:
    settings = transformers.EfficientNetConfig(
        width_coefficient=0.25, depth_coefficient=0.3, hidden_dim=320, strides=[1, 1, 2, 2, 1, 1, 1]
    )
    transformers.EfficientNetModel(settings).save_pretrained(tmp_path)
    backbone = build_pretrained(_config(tmp_path), tmp_path, {}).eval()
    assert (backbone.out_channels, backbone.stride, backbone.middle) == (320, 8, 4)
    with torch.no_grad():
        assert backbone(torch.rand(2, 1, 48, 32)).shape == (2, 320, 6, 4)


def test_a_place_of_the_map_looks_at_its_own_part_of_the_image(folder: Path) -> None:
    backbone = build_pretrained(_config(folder), folder, {}).eval()
    images = torch.rand(1, 3, 64, 64)
    changed = images.clone()
    changed[:, :, -backbone.stride :, : backbone.stride] += 1.0  # the lower left place
    with torch.no_grad():
        difference = (backbone(changed) - backbone(images)).abs().sum(1)[0]
    assert difference.argmax() == (difference.shape[0] - 1) * difference.shape[1]


def test_no_batch_changes_what_is_said_of_an_image(folder: Path) -> None:
    backbone = build_pretrained(_config(folder), folder, {}).train()
    images = torch.rand(4, 3, 64, 64)
    before = {name: value.clone() for name, value in backbone.named_buffers()}
    alone, together = backbone(images[:1]), backbone(images)
    torch.testing.assert_close(together[:1], alone, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in backbone.named_buffers())
    assert has_batch_statistics(backbone) is None


def test_a_model_folder_holds_the_config_and_needs_no_hub(folder: Path, tmp_path: Path) -> None:
    backbone = build_pretrained(_config(folder), folder, {})
    save_config(backbone, tmp_path)
    again = build_pretrained(_config(Path("no/longer/there")), tmp_path, {})
    assert isinstance(again, PretrainedBackbone)
    again.load_state_dict(backbone.state_dict())
    assert (tmp_path / CONFIG_FILE).is_file()


def test_another_commit_of_a_hub_model_is_prepared_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serving() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        facts = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            MODELS["resnet"]().save_pretrained(tmp_path / f"model{seed}")
            commit = hub.put("own/resnet", tmp_path / f"model{seed}")
            model = {"pretrained": "own/resnet", "revision": commit}
            config = config_of(tmp_path / "cache", {"model": model}, path="synthetic", images=60)
            facts.append(load_facts(prepare(config, RECIPE, lambda text: None)))
            assert facts[-1]["pretrained"]["revision"] == commit
    assert facts[0]["fingerprint"] != facts[1]["fingerprint"]


@pytest.mark.parametrize(
    ("size_px", "tile_px", "fits"),
    [(64, None, True), (96, None, False), ([64, 96], None, False), (256, 64, True), (256, 48, False), (48, 64, False)],
)
def test_images_and_tiles_of_another_size_than_the_patches_were_made_for_are_refused(
    tmp_path: Path, size_px: Any, tile_px: int | None, fits: bool
) -> None:
    MODELS["vit"]().save_pretrained(tmp_path)
    model = {"pretrained": str(tmp_path), "tile_px": tile_px}
    config = Config(recipe="defect_detection", model=model, data={"size_px": size_px})  # type: ignore[arg-type]
    if fits:
        build_pretrained(config, tmp_path, {})
        return
    said = rf"data.size_px is {re.escape(str(size_px))}.* reads images of 64x64 pixels: set data.size_px=64, or"
    with pytest.raises(ConfigError, match=said):
        build_pretrained(config, tmp_path, {})


def test_colour_for_a_grey_model_is_refused(tmp_path: Path) -> None:
    described = transformers.ConvNextV2Config(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, num_channels=1)
    transformers.ConvNextV2Model(described).save_pretrained(tmp_path)
    for channels, fits in ((1, True), (3, False)):
        data = {"size_px": 64, "channels": channels}
        config = Config(recipe="defect_detection", model={"pretrained": str(tmp_path)}, data=data)  # type: ignore[arg-type]
        if fits:
            build_pretrained(config, tmp_path, {})
            continue
        with pytest.raises(ConfigError, match=r"data.channels is 3, but .* set data.channels=1"):
            build_pretrained(config, tmp_path, {})


def test_what_is_no_image_model_and_pickled_weights_are_refused(tmp_path: Path) -> None:
    transformers.BertModel(
        transformers.BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    ).save_pretrained(tmp_path / "bert")
    with pytest.raises(DataError, match="bert"):
        build_pretrained(_config(tmp_path / "bert"), tmp_path / "bert", {})
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_text("{}")
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(UnsafeInputError):
        build_pretrained(_config(tmp_path / "pickled"), tmp_path / "pickled", {})
