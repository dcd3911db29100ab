"""Train a shipped recipe for a few steps, under any strategy, on the ranks of `run_ranks`."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dist_train import config_io
from dist_train.deepspeed_config import deepspeed_config
from dist_train.hardware import Hardware
from dist_train.heartbeat import Heartbeat
from dist_train.loop import train
from dist_train.parity import whole_weights
from dist_train.plan import make_plan
from dist_train.prepared import prepare
from dist_train.recipe import load_recipe
from dist_train.resume import build_training, restore
from dist_train.rundir import RunDir, write_json
from dist_train.stop import StopFlag
from tests.fakes import curve


def take_steps(
    name: str, words: Sequence[str], strategy: str, world_size: int, folder: str | None = None
) -> tuple[list[float], dict[str, Tensor]]:
    """The losses of all steps so far, and the whole weights. folder: of the run, which goes on from its checkpoint."""
    config: Any = config_io.load(name, [*words, f"parallel.strategy={strategy}"], site=False).config
    recipe = load_recipe(config.recipe)
    task = recipe.make_task(config, prepare(config, recipe, lambda text: None))
    run = RunDir(folder or tempfile.mkdtemp())
    run.logs.mkdir(parents=True, exist_ok=True)
    plan = make_plan(config, Hardware("host", "cpu", 2, 8.0), len(task.rows("train").ids), world_size)
    write_json(run.deepspeed_config, deepspeed_config(plan, 1.0) if strategy.startswith("zero") else {})
    heartbeat = Heartbeat(run, int(os.environ.get("RANK", "0")))
    training = build_training(run, config, plan, task, 1, recipe.score, {}, StopFlag(), heartbeat)
    restore(training)
    train(training)
    return curve(run.path), whole_weights(training.engine)
