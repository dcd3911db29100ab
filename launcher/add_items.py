"""dist-train add-items: new items for the catalogue of a trained recommender, without training."""

from __future__ import annotations

import shlex
from pathlib import Path

from dist_train.errors import ConfigError
from dist_train.recipe import load_recipe
from dist_train.rundir import MODEL_RECORD, find_model_folder, read_json


def add_items(path: str, file: str, output: str) -> None:
    """Write the model of a run or folder to `output`, with the items of the file."""
    folder = find_model_folder(path)
    key = read_json(folder / MODEL_RECORD)["recipe"]
    module = load_recipe(key).add_items
    if module is None:
        raise ConfigError(f"the model of {path} has no catalogue to add to: its recipe, {key}, has no add_items.py.")
    module.add_items(folder, file, Path(output), print)
    print(f"model folder   {output}")
    print(f"next           {shlex.join(['dist-train', 'predict', output, 'SESSIONS.csv'])}")
