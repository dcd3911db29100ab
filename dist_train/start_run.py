"""From a recipe or a run directory to a run that ranks can join: config, data, plan, directory. Torch-free.

`dist-train run` starts ranks with it; ranks that `accelerate launch` has started find their run with it.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import secrets
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dist_train import config_io, config_text, deepspeed_base, prepared
from dist_train.config import RunConfig
from dist_train.config_io import Loaded
from dist_train.contradictions import Settings, refuse
from dist_train.deepspeed_config import deepspeed_config
from dist_train.errors import ConfigError, DataError, StorageError, ToolkitError, UnmeasuredError
from dist_train.events import current_attempt, log_event
from dist_train.hardware import Hardware, detect_hardware
from dist_train.hub import settle_offline
from dist_train.memory_facts import Measure, model_facts
from dist_train.plan import LaunchPlan, make_plan
from dist_train.recipe import Recipe, load_recipe
from dist_train.rundir import (
    RunDir,
    default_run_name,
    json_text,
    name_taken,
    read_json,
    unwritable,
    write_atomic,
    write_json,
)

_PACKAGES = (
    *("torch", "accelerate", "deepspeed", "transformers", "datasets", "tokenizers", "safetensors", "wandb"),
    *("pydantic", "numpy", "pyarrow", "scikit-learn", "peft"),
)
# Below this a run would hardly write its logs; the checkpoints' need is known once the model is.
_LEAST_FREE_MIB = 64


@dataclass(frozen=True)
class Start:
    """A run that is about to start an attempt."""

    directory: RunDir
    config: RunConfig
    plan: LaunchPlan
    hardware: Hardware
    settings: Settings


Check = Callable[[Start], None]
"""Refuses what cannot start, before anything is written."""


def new_run(
    recipe_name: str,
    overrides: list[str],
    check: Check,
    git: dict[str, Any] | None,
    world_size: int | None = None,
    adapt: Callable[[Loaded], Loaded] = lambda loaded: loaded,
    measure: Measure | None = None,
    hardware: Hardware | None = None,
) -> Start:
    """Make the run directory of a recipe. The caller says what else must hold, and writes the attempt.

    git: the state of the code, for the record. world_size, adapt: where somebody else has started the ranks already,
    their number, and what that decides. measure: how a model is measured for its memory. hardware: what is planned
    for, if it is not this machine's.
    """
    loaded = adapt(config_io.load(recipe_name, overrides))
    directory = free_directory(loaded.config)
    check_output(directory)
    recipe = load_recipe(loaded.config.recipe)
    check_metric(loaded.config, recipe)
    loaded = pinned(loaded, recipe)
    config = loaded.config
    facts = prepare_data(config, recipe, loaded.sources)
    if not recipe.is_shipped:
        recipe.make_task(config, Path(facts["folder"]))  # what it lacks is said before there is a directory
    start = _planned(directory, config, loaded.sources, facts, world_size, measure, hardware)
    check(start)
    create_directory(start, facts, git)
    return start


def create_directory(start: Start, facts: dict[str, Any], git: dict[str, Any] | None) -> None:
    """The run directory with what is known before the first attempt."""
    directory, config = start.directory, start.config
    directory.create(
        {
            directory.config.name: config_text.dump(config, start.settings.sources, directory.name),
            directory.data_facts.name: json_text(facts),
            directory.environment.name: json_text(environment_facts(start.hardware, git, config)),
        }
    )


def known_run(
    directory: RunDir,
    overrides: list[str],
    accept: list[str],
    check: Check,
    world_size: int | None = None,
    adapt: Callable[[Loaded], Loaded] = lambda loaded: loaded,
    measure: Measure | None = None,
) -> Start:
    """A run that goes on, with what may change on resume. The caller holds the directory."""
    before = config_io.load_run_config(directory)
    sources = config_io.recorded_sources(directory)
    given = [text.partition("=")[0].removeprefix("--") for text in overrides]
    changed = Loaded(
        config_io.resume_overrides(before, overrides),
        sources | dict.fromkeys(given, "command line, on resume"),
        directory.config,
    )
    loaded = adapt(changed)
    recipe = load_recipe(loaded.config.recipe)
    facts = same_data(directory, loaded.config, recipe, accept)
    start = _planned(directory, loaded.config, loaded.sources, facts, world_size, measure)
    check(start)
    if overrides or loaded is not changed:
        write_atomic(directory.config, config_text.dump(loaded.config, loaded.sources, directory.name))
    write_json(directory.data_facts, facts)
    return start


def planned_run(directory: RunDir) -> Start:
    """A run as it is, to be looked at or evaluated again. The caller holds the directory."""
    config = config_io.load_run_config(directory)
    # An evaluation is exact on any number of ranks: this machine's are enough.
    config = config.model_copy(update={"parallel": config.parallel.model_copy(update={"nodes": 1})})
    recipe = load_recipe(config.recipe)
    facts = kept_data(directory, config, recipe)
    # Not judged by memory: evaluation needs the weights alone.
    hardware = detect_hardware()
    plan = make_plan(config, hardware, prepared.epoch_rows(config, recipe, facts))
    settings = Settings(config_io.flatten(config), config_io.recorded_sources(directory))
    return Start(directory, config, plan, hardware, settings)


def write_attempt(start: Start, event: str, commands: str) -> int:
    """Write what the ranks read, and note the attempt. Returns its number.

    commands: lines for commands.sh, with {attempt} in them.
    """
    directory, plan = start.directory, start.plan
    shutil.rmtree(directory.heartbeats, ignore_errors=True)  # of ranks that are no more
    write_json(directory.plan, plan.to_json())
    deepspeed = deepspeed_json(start)
    if deepspeed is not None:
        write_json(directory.deepspeed_config, deepspeed)
    attempt = current_attempt(directory.events) + 1
    record_commands(directory, commands.replace("{attempt}", str(attempt)))
    log_event(directory.events, event, attempt=attempt, pid=os.getpid(), world_size=plan.world_size)
    return attempt


def record_commands(directory: RunDir, lines: str) -> None:
    """Append to commands.sh."""
    before = directory.commands.read_text() if directory.commands.exists() else "#!/bin/sh\n"
    write_atomic(directory.commands, before + lines)


def deepspeed_json(start: Start) -> dict[str, Any] | None:
    """The run's complete DeepSpeed config; None where DeepSpeed has no part in it."""
    if not start.plan.strategy.startswith("zero"):
        return None
    base = deepspeed_base.deepspeed_base(start.config)
    return deepspeed_config(start.plan, start.config.optim.clip_norm, base)


def check_deepspeed_base(start: Start) -> None:
    """ConfigError for what contradicts the recipe in the user's own DeepSpeed JSON."""
    base = deepspeed_base.deepspeed_base(start.config)
    if base is not None:
        assert start.config.parallel.deepspeed_config is not None
        shown = deepspeed_base.shown_path(start.config.parallel.deepspeed_config)
        refuse(deepspeed_base.check(base, shown, start.plan, start.config.optim.clip_norm, start.settings))


def check_metric(config: RunConfig, recipe: Recipe) -> None:
    """eval.metric names a metric that the recipe chooses by."""
    known = recipe.score.metrics
    if config.eval.metric is not None and config.eval.metric not in known:
        raise ConfigError(f"eval.metric is {config.eval.metric}, but this recipe can choose by: {', '.join(known)}.")


def check_output(run: RunDir) -> None:
    """The run's name is free and its folder can be written, tried by writing. BusyError, StorageError."""
    if run.path.exists() or run.path.is_symlink():
        raise name_taken(run.path)
    folder = _existing_parent(run.path.parent)
    probe = folder / f".dist-train-probe-{os.getpid()}"
    try:
        # As root os.access says yes everywhere: only a write tells.
        probe.write_bytes(b"\0" * 4096)
        free_mib = shutil.disk_usage(folder).free / 2**20
    except OSError as error:
        raise unwritable(run.path.parent, error) from error
    finally:
        # Where the write has failed this fails with the same cause, which is being reported.
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
    if free_mib < _LEAST_FREE_MIB:
        raise StorageError(
            f"{folder} has {free_mib:.0f} MiB free, but a run needs {_LEAST_FREE_MIB} MiB at the very least: "
            "free some space, or choose another folder with output_dir=..."
        )


def pinned(loaded: Loaded, recipe: Recipe) -> Loaded:
    """The config with the hub names in it pinned to the commits that they stand for now, which are fetched: whoever
    repeats or resumes the run gets the same files, and needs no network for them."""
    settle_offline(loaded.config.data)
    pins = getattr(recipe.data, "pins", None)
    found: dict[str, str] = {} if pins is None else pins(loaded.config, lambda text: print(text, flush=True))
    config, sources = loaded.config, dict(loaded.sources)
    for key, commit in found.items():
        group, _, name = key.partition(".")
        section = getattr(config, group)
        asked = getattr(section, name)
        if asked != commit:
            config = config.model_copy(update={group: section.model_copy(update={name: commit})})
            sources[key] = "the hub's newest" if asked is None else f"{sources.get(key, 'default')}: {asked}"
    return Loaded(config, sources, loaded.recipe_file)


def prepare_data(config: RunConfig, recipe: Recipe, sources: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The facts of the prepared data, with the folder that holds it.

    sources: where each key was set, for the end of a refusal.
    """
    settle_offline(config.data)
    try:
        folder = prepared.prepare(config, recipe, lambda text: print(text, flush=True))
    except ToolkitError as error:
        if sources is None or not error.keys:
            raise
        places = "; ".join(f"{key}: {sources.get(key, 'the default')}" for key in error.keys)
        raise type(error)(f"{error}\nSet in: {places}.") from error
    return {**prepared.load_facts(folder), "folder": str(folder)}


def kept_data(directory: RunDir, config: RunConfig, recipe: Recipe) -> dict[str, Any]:
    """The facts of the data that the run was trained on; prepared again where the cache was cleared."""
    recorded = read_json(directory.data_facts)
    if not prepared.is_whole(Path(recorded["folder"])):
        # Nothing is trained on it: what an older version prepared otherwise is no reason to refuse a report.
        recorded = same_data(directory, config, recipe, ["data"])
        write_json(directory.data_facts, recorded)
    return recorded


def same_data(directory: RunDir, config: RunConfig, recipe: Recipe, accept: list[str]) -> dict[str, Any]:
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
    misfit = recipe.data.misfit(recorded, facts) if hasattr(recipe.data, "misfit") else None
    if misfit is not None:
        raise ConfigError(f"the data has changed since {directory.path} started, and the weights do not fit: {misfit}")
    return facts


def environment_facts(hardware: Hardware, git: dict[str, Any] | None, config: RunConfig | None) -> dict[str, Any]:
    """What environment.json holds; a user's own script has no config that we know."""
    versions: dict[str, str | None] = {}
    for name in ("dist-train", *_PACKAGES):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    facts = {
        "versions": versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "git": git,
        "hardware": asdict(hardware),
    }
    if config is not None:
        facts["seeds"] = {"seed": config.seed, "split_seed": getattr(config.data, "split_seed", None)}
    return facts


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


def read_commit() -> dict[str, Any] | None:
    """The commit of the checkout around the working directory, read from its files; null without one."""
    for folder in (Path.cwd(), *Path.cwd().parents):
        head = folder / ".git" / "HEAD"
        if not head.is_file():
            continue
        text = head.read_text().strip()
        reference = folder / ".git" / text.removeprefix("ref: ")
        if text.startswith("ref: "):
            text = reference.read_text().strip() if reference.is_file() else ""
        return {"commit": text or None, "dirty": None, "folder": str(folder)}
    return None


def free_name(stem: str) -> str:
    """A name for a run that was given none; one that is not there yet."""
    return f"{default_run_name(stem, time.time())}-{secrets.token_hex(2)}"


def free_directory(config: RunConfig) -> RunDir:
    return RunDir(config.output_dir / (config.name or free_name(config.recipe)))


def _planned(
    directory: RunDir,
    config: RunConfig,
    sources: Mapping[str, str],
    facts: dict[str, Any],
    world_size: int | None,
    measure: Measure | None,
    hardware: Hardware | None = None,
) -> Start:
    """On a GPU the plan judges memory, with a model that is measured where it has not been; on a CPU, where it has."""
    hardware = hardware or detect_hardware()
    device = "cuda" if hardware.gpus else "cpu"
    recipe = load_recipe(config.recipe)
    known = model_facts(config, recipe, facts, device, measure if hardware.gpus else None)
    try:
        if known is not None:
            known.profile(config.train.activation_checkpointing)
    except UnmeasuredError as error:
        print(f"note           the plan does not judge memory: {error}", flush=True)
        known = None
    plan = make_plan(config, hardware, prepared.epoch_rows(config, recipe, facts), world_size, known)
    return Start(directory, config, plan, hardware, Settings(config_io.flatten(config), sources))


def _existing_parent(path: Path) -> Path:
    while not path.exists() and path != path.parent:
        path = path.parent
    return path
