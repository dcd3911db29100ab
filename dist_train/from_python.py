"""Train from Python: in a notebook, under a debugger, or in a script that a launcher starts on every rank."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from dist_train import config_io, prepared
from dist_train.config import RunConfig
from dist_train.contradictions import Settings
from dist_train.direct_start import RefusedError, joined
from dist_train.errors import ConfigError, ToolkitError
from dist_train.events import current_attempt, log_event
from dist_train.hardware import detect_hardware
from dist_train.heartbeat import Heartbeat
from dist_train.hub import settle_offline
from dist_train.launcher_settings import number_of_ranks
from dist_train.plan import LaunchPlan, make_plan
from dist_train.rank_environment import settle_environment, settle_rank_variables
from dist_train.recipe import Recipe, load_recipe
from dist_train.rundir import RunDir, read_json
from dist_train.score import read_score
from dist_train.start_run import (
    Start,
    check_metric,
    check_output,
    create_directory,
    free_directory,
    pinned,
    print_plan,
    read_commit,
    write_attempt,
)
from dist_train.stop import StopFlag
from dist_train.task import facts_of_rows, with_defaults
from dist_train.worker import Attempt, train_task


def train(task: Any, config: RunConfig, score: Any = None, resume: bool = False) -> RunDir:
    """Train `task` to its end in this process, evaluate and report, as `dist-train run` does: same loop, checkpoints
    and run directory. Under torchrun or accelerate launch every rank calls it alike.

    score: what has METRIC and measure; else that of the recipe that the config names, `task.score`, or the module that
    defines the task. resume: go on from the newest checkpoint of the run that config.name names.

    Returns the run directory: report.json there has every figure. ToolkitError for what a user can mend; Preempted
    after Ctrl-C, when the step is saved.
    """
    settle_rank_variables()
    recipe = _recipe_of(config)
    module = task if isinstance(task, ModuleType) else sys.modules[type(task).__module__]
    task = with_defaults(task, module.__name__)
    if score is None and recipe is not None:
        scored = recipe.score
    else:
        scored = read_score(score or getattr(task, "score", module), module.__name__)
    stop, rank = StopFlag(), int(os.environ.get("RANK", "0"))
    with contextlib.ExitStack() as held:
        held.enter_context(stop.installed())
        try:
            # What is refused is raised here, with its traceback into the user's code: nothing needs to be printed.
            run = held.enter_context(joined(lambda stack: _start(task, config, resume, stack), lambda error: None))
        except RefusedError as error:
            if isinstance(error.__cause__, ToolkitError):
                raise error.__cause__ from None
            raise
        plan = LaunchPlan.from_json(read_json(run.plan))
        settle_environment(plan.device, plan.strategy, plan.deterministic)
        number = current_attempt(run.events)
        # A notebook's cells lie in no file.
        own = [Path(str(module.__file__))] if getattr(module, "__file__", None) else []
        code = recipe.source_files() if recipe is not None else own
        train_task(Attempt(run, number, config, plan, stop, Heartbeat(run, rank)), task, scored, code)
        if rank == 0:
            log_event(run.events, "finished", attempt=number)
    return run


def _start(task: Any, config: RunConfig, resume: bool, held: contextlib.ExitStack) -> Start:
    if resume and config.name is None:
        raise ConfigError("resume is True, but the config has no name: set the name of the run that is to go on.")
    directory = RunDir(config.output_dir / str(config.name)) if resume else free_directory(config)
    if not resume:
        check_output(directory)
    if getattr(config.data, "stage_to", None) is not None:
        print("note           data.stage_to has no part in a training from Python: its task has read the data already")
    facts = _facts(task)
    hardware = detect_hardware()
    plan = make_plan(config, hardware, facts["splits"]["train"]["rows"], number_of_ranks())
    start = Start(directory, config, plan, hardware, Settings(config_io.flatten(config), {}))
    if not resume:
        create_directory(start, facts, read_commit())
    elif read_json(RunDir.existing(directory.path).data_facts)["fingerprint"] != facts["fingerprint"]:
        raise ConfigError(f"the rows of the task are not those that {directory.path} was started with.")
    held.enter_context(directory.locked())
    write_attempt(start, "run_started", f"# attempt {{attempt}}, dist_train.train(...) in {Path.cwd()}\n")
    print_plan(directory, plan)
    return start


def load_config(recipe: str, settings: list[str]) -> RunConfig:
    """The config of a recipe, hub names in it pinned to their commits, as in a run's own config."""
    loaded = config_io.load(recipe, settings)
    return pinned(loaded, load_recipe(loaded.config.recipe)).config


def make_task(config: RunConfig) -> Any:
    """The task of the config's recipe, its data prepared, or found prepared."""
    settle_offline(config.data)
    recipe = load_recipe(config.recipe)
    check_metric(config, recipe)
    return recipe.make_task(config, prepared.prepare(config, recipe))


def _recipe_of(config: RunConfig) -> Recipe | None:
    """None where config.recipe is but a name that the user's program gave."""
    try:
        return load_recipe(config.recipe)
    except ConfigError:
        return None


def _facts(task: Any) -> dict[str, Any]:
    folder = getattr(task, "prepared", None)
    if folder is not None and prepared.is_whole(folder):
        return {**prepared.load_facts(folder), "folder": str(folder)}
    found = facts_of_rows(task)
    return prepared.completed(found, found["rows_fingerprint"]) | {"folder": ""}
