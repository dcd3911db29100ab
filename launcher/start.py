"""The commands that train: run and resume. Config, preflight, data, plan, run directory, ranks, in this order."""

from __future__ import annotations

import bdb
import importlib.metadata
import os
import platform
import secrets
import shlex
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from dist_train import config_io
from dist_train.config import RunConfig
from dist_train.errors import ConfigError, DataError
from dist_train.events import current_attempt, log_event, read_lines
from dist_train.hardware import Hardware, detect_hardware
from dist_train.heartbeat import Heartbeat
from dist_train.plan import LaunchPlan, make_plan
from dist_train.recipe import Recipe, load_recipe
from dist_train.rundir import RunDir, default_run_name, json_text, read_json, write_atomic, write_json
from dist_train.stop import StopFlag
from launcher.accelerate_config import accelerate_config, launch_command, worker_environment
from launcher.preflight import check_can_start, check_gpus, check_imports, check_metric, check_one_rank, check_output
from launcher.process import Supervisor, read_output
from launcher.watch import Watch

_PACKAGES = (
    *("torch", "accelerate", "transformers", "datasets", "tokenizers", "safetensors", "wandb"),
    *("pydantic", "numpy", "pyarrow", "scikit-learn"),
)


def run(recipe_name: str, overrides: list[str], debug: bool = False) -> RunDir:
    """Train from a recipe file to the report, in a new run directory."""
    loaded = config_io.load(recipe_name, overrides)
    config = loaded.config
    directory = _free_directory(config)
    check_imports()
    check_output(directory)
    recipe = load_recipe(config.recipe)
    check_metric(config, recipe)
    facts = prepare_data(config, recipe)
    hardware = detect_hardware()
    plan = make_plan(config, hardware, facts["splits"]["train"]["rows"])
    _check_start(plan, hardware, debug)
    directory.create(
        {
            directory.config.name: config_io.dump(config, loaded.sources, directory.name),
            directory.data_facts.name: json_text(facts),
            directory.environment.name: json_text(_environment(config, hardware)),
        }
    )
    with directory.locked():
        _attempt(directory, config, plan, hardware, debug)
    return directory


def resume(path: str, overrides: list[str], accept: list[str], debug: bool = False) -> RunDir:
    """Go on from the newest checkpoint that verifies, with the same result as if nothing had happened."""
    directory = RunDir.existing(path)
    print(f"resume         these may change: {', '.join(config_io.RESUMABLE)}")
    with directory.locked():
        before = config_io.load_run_config(directory)
        config = config_io.resume_overrides(before, overrides)
        recipe = load_recipe(config.recipe)
        facts = _same_data(directory, config, recipe, accept)
        hardware = detect_hardware()
        plan = make_plan(config, hardware, facts["splits"]["train"]["rows"])
        _check_start(plan, hardware, debug)
        if overrides:
            sources = config_io.recorded_sources(directory)
            given = [text.partition("=")[0] for text in overrides]
            sources |= dict.fromkeys(given, "command line, on resume")
            write_atomic(directory.config, config_io.dump(config, sources, directory.name))
        write_json(directory.data_facts, facts)
        _attempt(directory, config, plan, hardware, debug, tuple(f"--accept={word}" for word in accept))
    return directory


def evaluate(path: str, checkpoint: str) -> tuple[RunDir, RunDir]:
    """Evaluate a checkpoint again, on the ranks of the run's config. Returns the run, and where the results lie."""
    directory = RunDir.existing(path)
    if checkpoint not in ("best", "last") and not checkpoint.isdigit():
        raise ConfigError(f"--checkpoint is {checkpoint}, but must be best, last or a step.")
    with directory.locked():
        config = config_io.load_run_config(directory)
        hardware = detect_hardware()
        facts = kept_data(directory, config, load_recipe(config.recipe))
        plan = make_plan(config, hardware, facts["splits"]["train"]["rows"])
        _check_start(plan, hardware, debug=False)
        # Newer code may evaluate an older run; it only may not go on training it without a word.
        _attempt(directory, config, plan, hardware, False, (f"--evaluate={checkpoint}", "--accept=code"))
    reported = [record["folder"] for record in read_lines(directory.events) if record["event"] == "reported"]
    return directory, RunDir(reported[-1])


def _free_directory(config: RunConfig) -> RunDir:
    """The run's directory; without a name one that is not there yet."""
    if config.name is not None:
        return RunDir(config.output_dir / config.name)
    name = f"{default_run_name(config.recipe, time.time())}-{secrets.token_hex(2)}"
    return RunDir(config.output_dir / name)


def _check_start(plan: LaunchPlan, hardware: Hardware, debug: bool) -> None:
    check_gpus(plan, hardware)
    check_can_start(plan)
    if debug:
        check_one_rank(plan)


def prepare_data(config: RunConfig, recipe: Recipe) -> dict[str, Any]:
    """The facts of the prepared data, with the folder that holds it."""
    folder = recipe.data.prepare(config, lambda text: print(text, flush=True))
    return {**recipe.data.load_facts(folder), "folder": str(folder)}


def kept_data(directory: RunDir, config: RunConfig, recipe: Recipe) -> dict[str, Any]:
    """The facts of the data that the run was trained on; prepared again where the cache was cleared."""
    recorded = read_json(directory.data_facts)
    if not recipe.data.is_whole(Path(recorded["folder"])):
        recorded = _same_data(directory, config, recipe, [])
        write_json(directory.data_facts, recorded)
    return recorded


def _same_data(directory: RunDir, config: RunConfig, recipe: Recipe, accept: list[str]) -> dict[str, Any]:
    """The run's own data, if it is what it was. ConfigError when the source has changed since."""
    recorded = read_json(directory.data_facts)
    try:
        facts = prepare_data(config, recipe)
    except DataError as error:
        if not Path(recorded["folder"]).is_dir():
            raise
        print(f"the data's source cannot be read ({str(error).splitlines()[0]}); going on with the prepared copy.")
        return recorded
    if facts["fingerprint"] != recorded["fingerprint"] and "data" not in accept:
        raise ConfigError(
            f"the data has changed since {directory.path} started (fingerprint {recorded['fingerprint'][:12]} then, "
            f"{facts['fingerprint'][:12]} now).\nBring the old data back, start a new run, or go on with the changed "
            "data all the same: dist-train resume ... --accept data"
        )
    misfit = recipe.data.misfit(recorded, facts)
    if misfit is not None:
        raise ConfigError(f"the data has changed since {directory.path} started, and the weights do not fit: {misfit}")
    return facts


def _attempt(
    directory: RunDir,
    config: RunConfig,
    plan: LaunchPlan,
    hardware: Hardware,
    debug: bool,
    arguments: tuple[str, ...] = (),
) -> None:
    """Start the ranks once and wait for them."""
    shutil.rmtree(directory.heartbeats, ignore_errors=True)  # of ranks that are no more
    write_json(directory.plan, plan.to_json())
    write_atomic(directory.accelerate_config, yaml.safe_dump(accelerate_config(plan)))
    command = launch_command(plan, directory, arguments)
    attempt = current_attempt(directory.events) + 1
    _record_command(directory, attempt, command)
    started = "evaluation_started" if any(word.startswith("--evaluate=") for word in arguments) else "run_started"
    log_event(directory.events, started, attempt=attempt, pid=os.getpid(), world_size=plan.world_size)
    print_plan(directory, plan)
    if debug:
        from dist_train.worker import run_rank

        # In this very process, so that breakpoints work.
        os.environ["CUDA_VISIBLE_DEVICES"] = worker_environment(plan, hardware)["CUDA_VISIBLE_DEVICES"]
        stop = StopFlag()
        stop.install()
        try:
            run_rank(directory, attempt, stop, Heartbeat(directory, 0), arguments)
        except bdb.BdbQuit:
            raise KeyboardInterrupt from None
        log_event(directory.events, "finished", attempt=attempt)
        return
    last_step = min(plan.steps, config.train.stop_after_steps or plan.steps)
    watch = Watch(directory, plan, last_step)
    try:
        Supervisor(directory, attempt).run_to_end(command, worker_environment(plan, hardware), watch)
    finally:
        watch.close()
    log_event(directory.events, "finished", attempt=attempt)


def print_plan(directory: RunDir | None, plan: LaunchPlan) -> None:
    if directory is not None:
        print(f"run directory  {directory.path}")
    ranks = f"{plan.world_size} x {plan.device}"
    print(f"plan           {ranks}, {plan.strategy}, {plan.precision}; {plan.equation}")
    print(
        f"length         {plan.steps} steps, {plan.steps_per_epoch} an epoch of {plan.rows} rows "
        f"({plan.steps / plan.steps_per_epoch:.3g} epochs)"
    )
    for note in plan.notes:
        print(f"note           {note}")


def _record_command(directory: RunDir, attempt: int, command: list[str]) -> None:
    """Append what this attempt ran to commands.sh."""
    before = directory.commands.read_text() if directory.commands.exists() else "#!/bin/sh\n"
    typed = shlex.join(["dist-train", *sys.argv[1:]])
    text = f"# attempt {attempt}, typed in {os.getcwd()}\n# {typed}\n# which started the ranks with\n"
    write_atomic(directory.commands, f"{before}{text}# {shlex.join(command)}\n")


def _environment(config: RunConfig, hardware: Hardware) -> dict[str, Any]:
    seeds = {"seed": config.seed, "split_seed": getattr(config.data, "split_seed", None)}
    return {
        "versions": {"dist-train": importlib.metadata.version("dist-train"), **_versions()},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "git": _git_state(),
        "hardware": asdict(hardware),
        "seeds": seeds,
    }


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _git_state() -> dict[str, Any] | None:
    """Commit of the checkout that the run was typed in, else of the one that this toolkit runs from; null without."""
    for folder in (Path.cwd(), Path(__file__).resolve().parent):
        commit = read_output(["git", "-C", str(folder), "rev-parse", "HEAD"])
        if commit is not None:
            changes = read_output(["git", "-C", str(folder), "status", "--porcelain", "-uno"])
            return {"commit": commit, "dirty": bool(changes), "folder": str(folder)}
    return None
