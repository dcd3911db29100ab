"""What the plan must know of model and data to judge memory: the model's profile, measured or kept, and row lengths."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dist_train.config import RunConfig
from dist_train.errors import UnmeasuredError
from dist_train.fit import ModelFacts
from dist_train.model_profile import ModelProfile, load_profile, profile_file
from dist_train.plan import planned_precision
from dist_train.recipe import Recipe

Measure = Callable[[RunConfig, Path, Path, str], None]
"""(config, folder of the prepared data, file to write, precision): measures a profile, in seconds."""


def model_facts(
    config: RunConfig, recipe: Recipe, data: dict[str, Any], device: str, measure: Measure | None
) -> ModelFacts | None:
    """data: what data.json holds. measure: how a profile is made that is not in the cache; None: then there are no
    facts, and the plan chooses without."""
    folder = Path(data["folder"])
    precision = planned_precision(config, device)

    @functools.cache
    def profile(checkpointing: bool) -> ModelProfile:
        train = config.train.model_copy(update={"activation_checkpointing": checkpointing})
        changed = config.model_copy(update={"train": train})
        path = _profile_path(changed, recipe, data, precision)
        found = load_profile(path)
        if found is None and measure is not None:
            measure(changed, folder, path, precision)
            found = load_profile(path)
        if found is None:
            raise UnmeasuredError(f"the model could not be measured for the plan: {path} was not written.")
        return found

    if measure is None and load_profile(_profile_path(config, recipe, data, precision)) is None:
        return None
    return ModelFacts(profile, _lengths(recipe, data, folder))


def _profile_path(config: RunConfig, recipe: Recipe, data: dict[str, Any], precision: str) -> Path:
    return profile_file(config, data["fingerprint"], precision, recipe.folder)


def _lengths(recipe: Recipe, data: dict[str, Any], folder: Path) -> Any:
    """What each training row costs; all alike where the recipe does not say."""
    if hasattr(recipe.data, "lengths"):
        return recipe.data.lengths(folder)
    return np.ones(data["splits"]["train"]["rows"], dtype=np.int64)
