"""Hugging Face image models as backbones: loaded safely, without heads, their batch statistics left as they are."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dist_train.errors import ConfigError, DataError
from dist_train.pretrained import check_folder, pretrained_folder
from recipes.defect_detection.config import Config

CONFIG_FILE = "backbone.json"
"""The model's own config, in the model folder."""
# Side of the image that shows the shape of a model's feature map.
_SHOWN_PX = 64


class PretrainedBackbone(nn.Module):
    """images [n, channels, height, width] -> the last feature map [n, out_channels, h, w] of any model that gives one,
    or patches in rows."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.in_channels = int(getattr(model.config, "num_channels", 3))
        self.out_channels, self.stride = _shape_of(model)
        self.middle = self.stride / 2
        # Statistics of a batch would differ with the ranks that share it: they stay those of the pretraining.
        self._frozen = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]

    def train(self, mode: bool = True) -> PretrainedBackbone:
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[1] != self.in_channels:
            images = images.expand(-1, self.in_channels, -1, -1)
        return _as_map(self.model(images).last_hidden_state, images.shape[2:], self.stride)


def build_pretrained(config: Config, prepared: Path, facts: dict[str, Any]) -> PretrainedBackbone:
    """The backbone of model.pretrained with its weights; from a model folder, which has its config alone, one to load
    weights into. DataError for a folder that holds no such model, ConfigError where the images do not go with it."""
    from transformers import AutoConfig, AutoModel

    described = prepared / CONFIG_FILE
    if described.is_file():
        values = json.loads(described.read_text(encoding="utf-8"))
        return PretrainedBackbone(AutoModel.from_config(AutoConfig.for_model(**values), trust_remote_code=False))
    folder = pretrained_folder(config, prepared, facts)
    check_folder(folder)
    try:
        settings = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        _check_images(config, settings)
        model = AutoModel.from_pretrained(
            folder, config=settings, trust_remote_code=False, use_safetensors=True, local_files_only=True,
            dtype=torch.float32,
        )  # fmt: skip
        return PretrainedBackbone(model)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"model.pretrained is {config.model.pretrained}, which cannot be read: {error}") from error
    except ImportError as error:
        raise ConfigError(
            f"model.pretrained is {config.model.pretrained}, which needs a package that cannot be imported: {error}"
        ) from error
    except AttributeError as error:
        raise DataError(
            f"model.pretrained is {config.model.pretrained}, which is no model for images that has feature maps or "
            f"patches: {error}"
        ) from error


def _check_images(config: Config, settings: Any) -> None:
    """ConfigError where the model reads images of one size and gets others, or of fewer channels."""
    pretrained, tile = config.model.pretrained, config.model.tile_px
    reads = getattr(settings, "image_size", None)
    if reads is not None and hasattr(settings, "patch_size") and not hasattr(settings, "depths"):
        expected = (reads, reads) if isinstance(reads, int) else tuple(reads)
        height, width = config.data.height_width
        gets = (height, width) if tile is None else (min(height, tile), min(width, tile))
        if gets != expected:
            key = f"data.size_px is {config.data.size_px}" + (f" and model.tile_px {tile}" if tile is not None else "")
            square = f", or to look at larger ones in tiles model.tile_px={expected[0]}"
            raise ConfigError(
                f"{key}, but {pretrained} reads images of {expected[0]}x{expected[1]} pixels: set "
                f"data.size_px={expected[0] if expected[0] == expected[1] else list(expected)}"
                f"{square if expected[0] == expected[1] else ''}.",
                "data.size_px",
                "model.tile_px",
            )
    channels = int(getattr(settings, "num_channels", 3))
    if config.data.channels not in (1, channels):
        raise ConfigError(
            f"data.channels is {config.data.channels}, but {pretrained} reads images of {channels}: set "
            f"data.channels={channels}.",
            "data.channels",
        )


def save_config(backbone: PretrainedBackbone, folder: Path) -> None:
    text = json.dumps(backbone.model.config.to_dict(), indent=2, sort_keys=True)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def _shape_of(model: Any) -> tuple[int, int]:
    """Channels of the last feature map, and how many pixels one of its places is wide. AttributeError for a model that
    is not for images."""
    wrapped, config = getattr(model, "timm_model", None), model.config
    if wrapped is not None:
        return int(wrapped.num_features), int(wrapped.feature_info[-1]["reduction"])
    if hasattr(config, "patch_size") and hasattr(config, "hidden_size") and not hasattr(config, "depths"):
        return int(config.hidden_size), int(config.patch_size)
    # The families name their widths and strides in as many ways as there are: a small image shows them.
    with torch.no_grad():
        states = model.eval()(torch.zeros(1, config.num_channels, _SHOWN_PX, _SHOWN_PX)).last_hidden_state
    if states.dim() == 4:
        return int(states.shape[1]), _SHOWN_PX // int(states.shape[2])
    return int(states.shape[2]), _SHOWN_PX // math.isqrt(int(states.shape[1]))


def _as_map(states: Tensor, size: torch.Size, stride: int) -> Tensor:
    """A feature map as it is; patches [n, places, width] in rows, without the tokens that stand before them."""
    if states.dim() == 4:
        return states
    height, width = size[0] // stride, size[1] // stride
    patches = states[:, states.shape[1] - height * width :]
    return patches.transpose(1, 2).unflatten(2, (height, width))
