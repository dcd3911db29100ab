"""Plans and trains. Knows no recipe by name and nothing of `launcher` or `slurm`.

From Python: `load_config`, `make_task`, `train` and `load`. Importing this package imports nothing else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dist_train.config import RunConfig
    from dist_train.predict import Predictor
    from dist_train.rundir import RunDir

__version__ = "0.1.0"


def load_config(recipe: str, settings: list[str] | None = None) -> RunConfig:
    """The config of a recipe name or file, under settings like "train.epochs=3". ConfigError lists every problem."""
    from dist_train.from_python import load_config as load_pinned

    return load_pinned(recipe, settings or [])


def make_task(config: RunConfig) -> Any:
    """The task of the config's recipe, its data prepared, or found prepared. ConfigError, DataError."""
    from dist_train.from_python import make_task as make

    return make(config)


def train(task: Any, config: RunConfig, score: Any = None, resume: bool = False) -> RunDir:
    """Train a task in this process: see from_python.train."""
    from dist_train.from_python import train as train_here

    return train_here(task, config, score, resume)


def load(path: str, device: str | None = None) -> Predictor:
    """The model of a run directory or model folder, ready to answer: `load(RUN).predict(rows)`. ConfigError."""
    from dist_train.predict import Predictor

    return Predictor(path, device)
