"""The model that model.init_from starts from: where it lies, its labels, and whether its weights fit. Torch-free."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_train.errors import ConfigError, DataError
from dist_train.init_from import KEY, model_folder
from recipes.ticket_routing.config import Config

# What the weights' shapes and meaning depend on, by kind; dropout may differ.
_ARCHITECTURE = {"transformer": ("layers", "width", "heads", "feedforward"), "lstm": ("layers", "width")}
# The same of the Hugging Face encoders, which have no common names for it.
_PRETRAINED = (
    *("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"),
    *("max_position_embeddings", "dim", "n_layers", "n_heads", "hidden_dim"),
)


@dataclass(frozen=True)
class Earlier:
    folder: Path
    labels: list[str]
    data: str
    """Fingerprint of the data that it was trained on."""


def earlier_model(config: Config) -> Earlier | None:
    """None where a run starts anew. DataError when there is no such model, ConfigError when its weights cannot fit."""
    if config.model.init_from is None:
        return None
    folder = model_folder(config.model.init_from)
    facts = _read(folder / "facts.json")
    if "labels" not in facts or not (folder / "config.json").is_file():
        raise DataError(f"{KEY} is {config.model.init_from}, which is no model of ticket_routing: name one.", KEY)
    _refuse_misfits(config, folder, _read(folder / "config.json"))
    return Earlier(folder, facts["labels"], facts["fingerprint"])


def _refuse_misfits(config: Config, folder: Path, described: dict[str, Any]) -> None:
    """All that differs at once, each with both values."""
    own = described.get("model")  # a Hugging Face config has none
    model = config.model
    kind = own["kind"] if own else "pretrained"
    differ: list[tuple[str, Any, Any]]
    if kind != model.kind:
        differ = [("model.kind", model.kind, kind)]
    elif own:
        differ = [(f"model.{key}", getattr(model, key), own[key]) for key in _ARCHITECTURE[kind]]
        if kind == "transformer":  # each position has a weight
            differ.append(("data.max_tokens", config.data.max_tokens, described["max_tokens"]))
    else:
        assert model.pretrained is not None
        file = Path(model.pretrained) / "config.json"
        base = _read(file) if file.is_file() else {}  # a hub's is not here yet: the weights' shapes will tell
        differ = [(f"{key} of model.pretrained", base[key], described.get(key)) for key in _PRETRAINED if key in base]
    problems = [(key, here, there) for key, here, there in differ if here != there]
    if problems:
        lines = [f"  {key} is {here}, but there {there}" for key, here, there in problems]
        raise ConfigError(
            f"{KEY}: the weights in {folder} are of another architecture, as its config.json says:\n"
            + "\n".join(lines)
            + f"\nSet the same as there, or {KEY}=null to start anew.",
            *dict.fromkeys([key.split()[-1] for key, _, _ in problems] + [KEY]),
        )


def _read(path: Path) -> dict[str, Any]:
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{KEY}: {path} cannot be read: {error}.", KEY) from error
    return value
