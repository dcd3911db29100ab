"""What ticket routing takes from the hub: a pretrained encoder, a ready tokenizer; fetched before any rank starts."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dist_train.errors import DataError, UnsafeInputError
from dist_train.fetch import Fetched, fetch_model
from dist_train.hub import is_hub_name, is_offline
from recipes.ticket_routing.config import Config
from recipes.ticket_routing.earlier import earlier_model

Say = Callable[[str], None]


def pins(config: Config, say: Say) -> dict[str, str]:
    """The commits that this config's hub names stand for now, by the key that pins them."""
    model, tokenizer = fetched_model(config, say), _fetched_tokenizer(config, say)
    found = {"model.revision": model, "data.tokenizer_revision": tokenizer}
    return {key: fetched.revision for key, fetched in found.items() if fetched is not None}


def fetched_model(config: Config, say: Say = print) -> Fetched | None:
    """The encoder's files from the hub; None for an own model or a local folder, which is looked at."""
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


def tokenizer_folder(config: Config, say: Say = print) -> str | None:
    """The folder of the ready tokenizer; None where one is trained. Earlier weights go with their own."""
    earlier = earlier_model(config)
    if earlier is not None:
        return str(earlier.folder)
    fetched = _fetched_tokenizer(config, say) if config.data.tokenizer is not None else fetched_model(config, say)
    return str(fetched.folder) if fetched is not None else config.data.tokenizer or config.model.pretrained


def pretrained_facts(config: Config, prepared: Path, say: Say = print) -> dict[str, Any]:
    """What facts.json says of a fetched encoder. `beside`: folders that the ranks read beside the prepared one."""
    fetched = fetched_model(config, say)
    if fetched is None:
        return {}
    folder = os.path.relpath(fetched.folder, prepared)
    described = {"name": config.model.pretrained, "revision": fetched.revision, "folder": folder}
    return {"pretrained": {**described, "files": fetched.files}, "beside": [folder]}


def pretrained_folder(config: Config, prepared: Path, facts: dict[str, Any]) -> str:
    """Where the encoder's files lie: never a hub name, so that no rank asks the hub."""
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


def _fetched_tokenizer(config: Config, say: Say) -> Fetched | None:
    name = config.data.tokenizer
    if name is None or not is_hub_name(name):
        return None
    revision, cache = config.data.tokenizer_revision, config.data.cache_dir
    return fetch_model(name, revision, cache, is_offline(config.data), say, key="data.tokenizer", weights=False)
