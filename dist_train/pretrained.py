"""What a recipe's model.pretrained names: a folder, or what is fetched before any rank starts. Torch-free."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dist_train.errors import DataError, UnsafeInputError
from dist_train.fetch import Fetched, fetch_model
from dist_train.hub import is_hub_name, is_offline

Say = Callable[[str], None]


def fetched_model(config: Any, say: Say = print) -> Fetched | None:
    """The model's files from the hub; None for an own model or a local folder, which is looked at.

    config: with model.pretrained, model.revision and the keys of CachedData.
    """
    name = config.model.pretrained
    if name is None:
        return None
    if is_hub_name(name):
        return fetch_model(name, config.model.revision, config.data.cache_dir, is_offline(config.data), say)
    check_folder(name)
    return None


def check_folder(source: str) -> None:
    """DataError for a pretrained folder that is not there, UnsafeInputError for one without safetensors weights."""
    folder = Path(source)
    if not folder.is_dir():
        raise DataError(f"model.pretrained is {source}, but there is no such folder: give a folder or a hub name.")
    if not any(folder.glob("*.safetensors")):
        raise UnsafeInputError(
            f"model.pretrained is {source}, which holds no safetensors weights; pickle weights can run code and are "
            "not read. Convert them once: load the model where you trust it and call save_pretrained()."
        )


def pretrained_facts(config: Any, prepared: Path, say: Say = print) -> dict[str, Any]:
    """What facts.json says of a fetched model. `beside`: folders that the ranks read beside the prepared one."""
    fetched = fetched_model(config, say)
    if fetched is None:
        return {}
    folder = os.path.relpath(fetched.folder, prepared)
    described = {"name": config.model.pretrained, "revision": fetched.revision, "folder": folder}
    return {"pretrained": {**described, "files": fetched.files}, "beside": [folder]}


def pretrained_folder(config: Any, prepared: Path, facts: dict[str, Any]) -> str:
    """Where the model's files lie: never a hub name, so that no rank asks the hub."""
    assert config.model.pretrained is not None
    if "pretrained" not in facts:
        return config.model.pretrained
    folder = Path(os.path.normpath(prepared / facts["pretrained"]["folder"]))
    if not folder.is_dir():
        raise DataError(
            f"{config.model.pretrained} was fetched into {folder}, which is gone: `dist-train prepare` with the run's "
            "config.yaml fetches it again."
        )
    return str(folder)
