"""The model folder: a trained model with all that predictions need of it, wherever the folder is moved to.

What the recipe's task writes (weights, preprocessing, label list), recipe.yaml (the settings), facts.json (the data's
facts), dist_train.json (decision, versions, fingerprints) and README.md (the model card).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from dist_train.config import RunConfig
from dist_train.config_io import load
from dist_train.config_text import dump
from dist_train.errors import ConfigError, StorageError
from dist_train.recipe import load_recipe
from dist_train.rundir import MODEL_RECORD, json_text, read_json, write_json

FORMAT = 1
_WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class LoadedModel:
    """What a model folder holds, ready to predict."""

    task: Any
    model: nn.Module
    config: RunConfig
    record: dict[str, Any]


def write_model(folder: Path, task: Any, model: nn.Module) -> None:
    """The model as the task writes it, or its state by name."""
    if hasattr(task, "save_model"):
        task.save_model(model, folder)
        return
    write_state(folder, model)


def write_state(folder: Path, model: nn.Module) -> None:
    """The model's state by name."""
    # Copies: safetensors refuses weights that share memory, as tied ones do.
    save_file(
        {name: value.detach().clone().contiguous() for name, value in model.state_dict().items()}, folder / _WEIGHTS
    )


def read_model(folder: Path, task: Any) -> nn.Module:
    """What `write_model` wrote."""
    if hasattr(task, "load_model"):
        model: nn.Module = task.load_model(folder)
        return model
    model = task.build_model()
    model.load_state_dict(load_file(folder / _WEIGHTS))
    return model


def write_record(folder: Path, config: RunConfig, facts: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    """What stands beside the model: settings, the data's facts, and the record (see MODEL_RECORD)."""
    (folder / "recipe.yaml").write_text(dump(config, {}, str(record["run"])), encoding="utf-8")
    kept = {name: value for name, value in facts.items() if name != "folder"}
    (folder / "facts.json").write_text(json_text(kept), encoding="utf-8")
    write_json(folder / MODEL_RECORD, {"format": FORMAT, "recipe": config.recipe, **record})
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~mask)  # safetensors writes files that nobody else may read


def load_model_folder(folder: Path) -> LoadedModel:
    """The model of a folder on the CPU, in evaluation mode."""
    record = read_json(folder / MODEL_RECORD)
    if "format" not in record:
        raise ConfigError(
            f"{folder} was written by a version that kept no settings in it: write it again with dist-train eval RUN."
        )
    if record["format"] > FORMAT:
        raise ConfigError(
            f"{folder} was written by a newer version (format {record['format']}, this one reads {FORMAT})."
        )
    config = load(str(folder / "recipe.yaml"), site=False).config
    recipe = load_recipe(config.recipe)
    try:
        task = recipe.make_task(config, folder)
        model = read_model(folder, task).eval()
    except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
        raise StorageError(
            f"the model in {folder} is damaged, or not one of this version of {recipe.name}: "
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        ) from error
    return LoadedModel(task, model, config, record)
