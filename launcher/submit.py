"""dist-train submit: check and plan for the cluster, copy the code, write one sbatch script, hand it in."""

from __future__ import annotations

import contextlib
import itertools
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dist_train import checkpoint_files, config_io, config_text
from dist_train.config import RunConfig, SlurmConfig
from dist_train.errors import BusyError, ConfigError
from dist_train.hardware import Hardware, detect_hardware
from dist_train.recipe import load_recipe
from dist_train.rundir import RunDir, read_json, write_atomic, write_json
from dist_train.start_run import Start, check_deepspeed_base, new_run, print_plan
from launcher.handed_in import MEMBERS, hand_in, is_done, members_of, state_of
from launcher.launch import make_launch
from launcher.measure import measure_profile
from launcher.preflight import check_imports
from launcher.show_plan import imagined_hardware
from launcher.snapshot import snapshot
from launcher.start import check_accelerate_base, git_state
from slurm import client
from slurm.script import Job, render

# What a time limit must leave.
_LEAST_S = 120
# Options of `launch` that a submitted script has not.
_NOT_GIVEN = dict.fromkeys(("gpu_ids", "offload", "deepspeed_config", "accelerate_config"))


@dataclass(frozen=True)
class Wish:
    """What is asked of the cluster for one run."""

    nodes: int
    per_node: int
    """GPUs, or CPU ranks."""
    slurm: SlurmConfig

    @property
    def gpus(self) -> int:
        return 0 if self.slurm.gpus == "none" else self.per_node


def submit_recipe(recipe_name: str, overrides: list[str], is_dry: bool, after: str | None) -> RunDir | None:
    """Make the run of a recipe and submit it. Returns it; None where it was only shown."""
    check_imports()
    dependency = None if after is None else dependency_on(after)
    config = config_io.load(recipe_name, overrides).config
    wish = wish_of(config, is_dry)
    if is_dry:
        directory = RunDir(config.output_dir / (config.name or "NAME"))
        print(script_of(directory, wish, dependency), end="")
        return None
    directory = make_run(recipe_name, overrides, wish)
    with _removed_on_failure(directory):
        write_atomic(directory.job_script, script_of(directory, wish, dependency))
        hand_in(directory)
    return directory


def make_run(recipe_name: str, overrides: list[str], wish: Wish) -> RunDir:
    """The run of a recipe, planned for the cluster, with a copy of the code."""
    hardware = _cluster_hardware(wish)
    start = new_run(recipe_name, overrides, _check, git_state(), measure=measure_profile, hardware=hardware)
    directory = start.directory
    with _removed_on_failure(directory):
        own = None if load_recipe(start.config.recipe).is_shipped else Path(start.config.recipe)
        copied = snapshot(directory.code, own if own is not None and own.is_absolute() else None)
        if copied["project"] is not None:
            moved = start.config.model_copy(update={"recipe": copied["project"]})
            write_atomic(directory.config, config_text.dump(moved, start.settings.sources, directory.name))
        # The nodes hold their own plan against it.
        write_json(directory.planned, {"device": start.plan.device, "world_size": start.plan.world_size})
        print_plan(directory, start.plan)
    return directory


def submit_evaluation(
    run: str, overrides: list[str], checkpoint: str, is_dry: bool, after: str | None
) -> RunDir | None:
    """Evaluate a checkpoint of a run that was submitted, as a job of one node."""
    directory = RunDir.existing(run)
    dependency = None if after is None else dependency_on(after)
    config = config_io.load_run_config(directory)
    if checkpoint not in ("best", "last") and not checkpoint.isdigit():
        raise ConfigError(f"--checkpoint is {checkpoint}, but must be best, last or a step.")
    config = config_io.resume_overrides(config, overrides) if overrides else config
    wish = replace(wish_of(config, is_dry), nodes=1)
    if after is None:
        _check_evaluation(directory, checkpoint)
    words = ("eval", str(directory.path), "--checkpoint", checkpoint)
    script = directory.path / "evaluation.sh"
    text = script_of(directory, wish, dependency, stops_early=False, words=words)
    if is_dry:
        print(text, end="")
        return None
    if not directory.code.is_dir():
        snapshot(directory.code, None)
    write_atomic(script, text)
    job = client.submit(script)
    print(f"job            {job}: {script}")
    print(f"its output     {directory.logs}/slurm-{job}.log; dist-train status shows the training, not this job")
    return directory


def _check_evaluation(directory: RunDir, checkpoint: str) -> None:
    """What would fail when the job starts, unless it starts after another one."""
    state = state_of(directory)
    if state is not None and not state.has_ended:
        raise BusyError(f"the job {state.id} of {directory.path} waits or runs: add --after {directory.path}.")
    steps = checkpoint_files.committed_steps(directory.checkpoints)
    if not steps or (checkpoint.isdigit() and int(checkpoint) not in steps):
        known = ", ".join(map(str, sorted(steps))) or "none"
        raise ConfigError(f"--checkpoint is {checkpoint}, but {directory.path} has these steps: {known}.")


def submit_script(
    target: list[str], words: list[str], is_dry: bool, after: str | None, flags: dict[str, Any]
) -> RunDir | None:
    """Make the run of a user's own script and submit it. target: the script, or -m and a module. words: settings
    slurm.KEY=VALUE, then the script's own arguments."""
    check_imports()
    settings = list(itertools.takewhile(lambda word: word.startswith("slurm."), words))
    own = words[len(settings) :]
    late = [word for word in own if re.match(r"slurm\.\w+=", word)]
    if late:
        raise ConfigError(f"{late[0]} comes after {own[0]}: settings slurm.KEY=VALUE go before the script's arguments.")
    command = [*target, *own]
    dependency = None if after is None else dependency_on(after)
    slurm = config_io.slurm_settings(settings)
    if flags["gpus_per_node"] is None:
        raise ConfigError("say how many ranks each node has: --gpus-per-node K.")
    wish = Wish(flags["nodes"] or 1, flags["gpus_per_node"], slurm)
    if client.is_here() or not is_dry:
        check_room(wish)
    given = {**_NOT_GIVEN, **{name: flags[name] for name in ("gpus_per_node", "precision")}}
    given |= {"nodes": wish.nodes, "strategy": flags["strategy"] or "auto"}
    launch = make_launch(command, flags["name"], None, _cluster_hardware(wish), given)
    directory = launch.directory
    if is_dry:
        print(script_of(directory, wish, dependency, stops_early=False), end="")
        return None
    directory.create(launch.files)
    with _removed_on_failure(directory):
        is_module = command[0] == "-m"
        copied = snapshot(directory.code, Path.cwd() if is_module else Path(command[0]))
        moved = command if is_module else [copied["project"], *command[1:]]
        write_atomic(directory.plan, launch.plan_json(moved, code=copied["project"] if is_module else None))
        print(f"run directory  {directory.path}")
        print(f"plan           {launch.plan.world_size} x {launch.plan.device}, {launch.plan.strategy}")
        write_atomic(directory.job_script, script_of(directory, wish, dependency, stops_early=False))
        hand_in(directory)
    return directory


def script_of(
    directory: RunDir,
    wish: Wish,
    dependency: str | None = None,
    stops_early: bool = True,
    words: tuple[str, ...] = (),
    array: str | None = None,
    code: Path | None = None,
) -> str:
    """stops_early: whether what runs saves before the time limit and goes on afterwards. words: of the command that
    each node runs, by default the run's training. array: its indices. code: where the code lies, if elsewhere."""
    python = wish.slurm.python or sys.executable
    logs = Path(str(directory.logs).replace("%", "%%"))  # what follows a % is a pattern of sbatch
    return render(
        Job(
            name=directory.name,
            nodes=wish.nodes,
            gpus_per_node=wish.gpus,
            code=code or directory.code,
            command=(python, "-P", "-u", "-m", "launcher", *(words or ("node", str(directory.path)))),
            pid_file=directory.head_pid,
            log=logs / ("slurm-%j.log" if array is None else "slurm-%A_%a.log"),
            array=array,
            dependency=dependency,
            stops_early=stops_early,
        ),
        wish.slurm,
    )


def resubmit(path: str, overrides: list[str], accept: list[str]) -> RunDir:
    """Submit a run again that was submitted before and is no more. BusyError while its job waits or runs."""
    directory = RunDir.any_kind(path)
    state = state_of(directory)
    if state is not None and not state.has_ended:
        raise BusyError(f"the job {state.id} of {directory.path} waits or runs: nothing was touched. Stop it with "
                        f"dist-train cancel {directory.path}, or wait.")  # fmt: skip
    if not directory.config.is_file():
        if overrides:
            raise ConfigError(f"{directory.path} is of a script of your own: it has no settings that could change.")
        hand_in(directory)
        return directory
    config = config_io.resume_overrides(config_io.load_run_config(directory), overrides)
    wish = wish_of(config)
    if overrides:
        sources = config_io.recorded_sources(directory)
        changed = dict.fromkeys((text.partition("=")[0] for text in overrides), "command line, on resume")
        write_atomic(directory.config, config_text.dump(config, sources | changed, directory.name))
    write_json(directory.planned, {"device": None, "world_size": wish.nodes * wish.per_node})
    write_atomic(directory.job_script, script_of(directory, wish))
    hand_in(directory, accept)
    return directory


def dependency_on(run: str) -> str | None:
    """The dependency of a job that is to start when the run at this path has gone well; None when it has by now."""
    directory = RunDir(run)
    if not directory.job.is_file():
        raise ConfigError(f"--after is {run}, which was not submitted to Slurm: it has no {directory.job.name}.")
    state = state_of(directory)
    if state is not None and not state.has_ended:
        return f"afterok:{state.id}"
    each = members_of(directory.path) if (directory.path / MEMBERS).is_file() else [directory]
    undone = [member.path for member in each if not is_done(member)]
    if undone:
        raise ConfigError(
            f"--after is {run}, whose job has ended without {undone[0]} being done: nothing would be waited for. "
            f"Go on with it first: dist-train resume {undone[0]}"
        )
    return None


def check_room(wish: Wish) -> None:
    """ConfigError when the partition can never give what is asked for, with what it has."""
    found = {partition.name: partition for partition in client.partitions()}
    asked = wish.slurm.partition
    if asked is not None and "," in asked:
        return  # Slurm takes whichever has room
    time_asked = 0 if wish.slurm.time is None else client.minutes(wish.slurm.time)
    if wish.slurm.time is not None and 60 * time_asked < wish.slurm.stop_early_s + _LEAST_S:
        raise ConfigError(
            f"slurm.time is {wish.slurm.time} and slurm.stop_early_s is {wish.slurm.stop_early_s}, which leaves less "
            f"than {_LEAST_S} s for the start and the training, since Slurm may be a minute early: raise the one or "
            "lower the other."
        )
    name = asked or next((partition.name for partition in found.values() if partition.is_default), None)
    if name is None or name not in found:
        what = f"slurm.partition is {asked}" if asked else "slurm.partition is null and the cluster has no default"
        raise ConfigError(f"{what}: the cluster has {', '.join(sorted(found)) or 'no partition'}.")
    partition = found[name]
    problems = []
    if not partition.is_up:
        problems.append(f"the partition {name} is not up")
    for key, wanted, there in (
        ("parallel.nodes (--nodes)", wish.nodes, partition.nodes),
        ("parallel.processes_per_node (--gpus-per-node)", wish.gpus, partition.gpus_per_node),
        ("slurm.cpus_per_node", wish.slurm.cpus_per_node or 0, partition.cpus_per_node),
        ("slurm.time, in minutes,", time_asked, partition.most_minutes),
    ):
        if wanted > there:
            problems.append(f"{key} is {wanted}, but the partition {name} has {there}")
    if problems:
        raise ConfigError("; ".join(problems) + ". Ask for less, or for another slurm.partition.")


def wish_anywhere(config: RunConfig) -> Wish:
    """What the config asks for, whatever the cluster has."""
    per_node = config.parallel.processes_per_node
    if per_node is None:
        raise ConfigError("parallel.processes_per_node is null: say how many ranks each node has, --gpus-per-node K.")
    return Wish(config.parallel.nodes, per_node, config.slurm)


def wish_of(config: RunConfig, is_dry: bool = False) -> Wish:
    """What the config asks for, if the cluster has it; where it is only shown, Slurm need not be here."""
    wish = wish_anywhere(config)
    if client.is_here() or not is_dry:
        check_room(wish)
    return wish


def _cluster_hardware(wish: Wish) -> Hardware:
    """What the plan is made for."""
    here = detect_hardware()
    if wish.slurm.gpus == "none":
        cores = wish.slurm.cpus_per_node or wish.per_node
        return Hardware("cluster", "not known", cores, here.memory_gib)
    if wish.slurm.gpu_memory is not None:
        return imagined_hardware(wish.per_node, wish.slurm.gpu_memory, "slurm.gpu_memory")
    if not here.gpus:
        raise ConfigError(
            "slurm.gpu_memory is null, and this machine has no GPU to plan for: set it to the memory of one GPU there, "
            "for example 80GiB, or set slurm.gpus to none on a cluster of CPUs."
        )
    return here


def _check(start: Start) -> None:
    check_imports(start.plan.strategy)
    check_deepspeed_base(start)
    check_accelerate_base(start)


@contextlib.contextmanager
def _removed_on_failure(directory: RunDir) -> Iterator[None]:
    """The directory goes again when what follows fails: nothing was trained, and its name is to be free. Not where a
    job has it, or may have."""
    try:
        yield
    except client.NoAnswerError:
        raise
    except BaseException:
        if not directory.job.is_file() or not read_json(directory.job)["jobs"]:
            shutil.rmtree(directory.path, ignore_errors=True)
        raise
