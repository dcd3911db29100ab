"""dist-train launch: the user's own script, unchanged, under our configs, logs, signals and causes of the end."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from dist_train import config_io, deepspeed_base
from dist_train.config import ParallelConfig
from dist_train.contradictions import SCRIPT_FLAGS, Settings, read_json_table, refuse
from dist_train.deepspeed_config import script_deepspeed_config
from dist_train.errors import ConfigError, ToolkitError
from dist_train.events import current_attempt, log_event
from dist_train.hardware import Hardware, detect_hardware
from dist_train.rundir import ATTEMPT, CODE, RunDir, json_text, read_json
from dist_train.start_run import check_output, environment_facts, free_name, record_commands
from launcher import accelerate_base
from launcher.accelerate_config import (
    Rendezvous,
    accelerate_config,
    launch_command,
    script_environment,
    worker_environment,
)
from launcher.nodes import Notices, Place, Team, lead, leading
from launcher.preflight import check_can_start, check_deepspeed_build, check_gpus, check_imports
from launcher.process import Supervisor
from launcher.start import LET_GO_S, command_lines, git_state, tell_end
from launcher.watch import LogTail

_MODULE = "dist_train.user_script"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_FROM_ACCELERATE = {"bf16": "bf16", "fp16": "fp16"}


@dataclass(frozen=True)
class ScriptPlan:
    """What is decided for a user's own script; batches and length are the script's."""

    device: str
    strategy: str
    precision: str | None
    """None: the script's own."""
    offload: str | None
    nodes: int
    processes_per_node: int
    threads_per_process: int
    gpu_ids: tuple[str, ...]
    # A script has its own switches for these.
    activation_checkpointing: bool = False
    deterministic: bool = False

    @property
    def world_size(self) -> int:
        return self.nodes * self.processes_per_node


@dataclass(frozen=True)
class Launch:
    """A script's run that can be started."""

    directory: RunDir
    plan: ScriptPlan
    files: dict[str, str]
    """What the run directory begins with, beside plan.json."""

    def plan_json(self, command: list[str], **more: Any) -> str:
        """plan.json, which also says what is run."""
        return json_text(
            {**dataclasses.asdict(self.plan), "world_size": self.plan.world_size, "command": command, **more}
        )


def launch_script(command: list[str], name: str | None, output_dir: str | None, **options: Any) -> RunDir:
    """Run `command` (a script or -m MODULE, and its arguments) on every rank, to its end.

    options: nodes, gpus_per_node, gpu_ids, strategy, offload, precision, deepspeed_config, accelerate_config.
    """
    hardware = detect_hardware()
    launch = make_launch(command, name, output_dir, hardware, options)
    check_can_start(launch.plan)
    directory = launch.directory
    directory.create({**launch.files, directory.plan.name: launch.plan_json(command)})
    with directory.locked():
        _run(directory, launch.plan, hardware, command)
    return directory


def make_launch(
    command: list[str], name: str | None, output_dir: str | None, hardware: Hardware, options: dict[str, Any]
) -> Launch:
    """Check and plan it for this hardware; nothing is written."""
    _check_script(command)
    directory = _directory(command, name, output_dir)
    parallel = _parallel(options)
    accelerate_file, theirs = _base_file(parallel.accelerate_config, accelerate_base.read_accelerate_base)
    deepspeed_file, own_json = _base_file(parallel.deepspeed_config, read_json_table)
    precision = options["precision"] or _FROM_ACCELERATE.get((theirs or {}).get("mixed_precision", ""))
    plan = plan_script(parallel, precision, hardware)
    check_imports(plan.strategy)
    check_gpus(plan, hardware)
    check_deepspeed_build(plan.strategy, plan.device)
    settings = _settings(parallel, precision)

    deepspeed = None
    if plan.strategy.startswith("zero"):
        arguments = (plan.strategy, plan.offload, plan.device, plan.precision)
        deepspeed = script_deepspeed_config(*arguments)
        if own_json is not None:
            refuse(deepspeed_base.check_for_script(own_json, deepspeed_file, deepspeed, settings))
            deepspeed = script_deepspeed_config(*arguments, own_json)
    accelerate = accelerate_config(plan, directory.deepspeed_config, zero3_init=True)
    if theirs is not None:
        refuse(accelerate_base.check(theirs, accelerate_file, accelerate, deepspeed, settings))
        accelerate = accelerate_base.on_top(theirs, accelerate)

    check_output(directory)
    files = {
        directory.environment.name: json_text(environment_facts(hardware, git_state(), None)),
        directory.accelerate_config.name: yaml.safe_dump(accelerate),
    }
    if deepspeed is not None:
        files[directory.deepspeed_config.name] = json_text(deepspeed)
    return Launch(directory, plan, files)


def launch_in_job(directory: RunDir, place: Place | None, notices: Notices | None) -> None:
    """Start a script that was submitted."""
    plan, command = _read_plan(directory)
    hardware = detect_hardware()
    with leading(place, [str(directory.path)], notices) as team, directory.locked(LET_GO_S):
        if plan.device != ("cuda" if hardware.gpus else "cpu"):
            raise ConfigError(
                f"the script was planned for {plan.device} when it was submitted, but {os.uname().nodename} has "
                f"{len(hardware.gpus)} GPUs: look at slurm.gpus, and at the node's driver."
            )
        _run(directory, plan, hardware, command, team)


def ranks_of_node(
    run: RunDir, attempt: int, arguments: Sequence[str], rendezvous: Rendezvous, look: Callable[[], None]
) -> None:
    """Start this machine's ranks of a script that node 0 leads, and wait for them."""
    plan, command = _read_plan(run)
    check_imports(plan.strategy)
    check_deepspeed_build(plan.strategy, plan.device)
    started, environment = _ranks(run, plan, detect_hardware(), command, attempt, rendezvous)
    Supervisor(run, attempt, own_script=True).run_to_end(started, environment, look)


def _read_plan(run: RunDir) -> tuple[ScriptPlan, list[str]]:
    stored = read_json(run.plan)
    fields = {field.name: stored[field.name] for field in dataclasses.fields(ScriptPlan)}
    return ScriptPlan(**{**fields, "gpu_ids": tuple(fields["gpu_ids"])}), stored["command"]


def _ranks(
    run: RunDir,
    plan: ScriptPlan,
    hardware: Hardware,
    command: list[str],
    attempt: int,
    rendezvous: Rendezvous | None = None,
) -> tuple[list[str], dict[str, str]]:
    """The argv that starts the ranks of this machine, and their environment."""
    environment = worker_environment(plan, hardware, rendezvous) | script_environment(plan, run)
    environment[ATTEMPT] = str(attempt)
    code = read_json(run.plan).get("code")
    if code is not None:
        environment[CODE] = code
    return launch_command(plan, run, command, _MODULE, rendezvous), environment


def plan_script(parallel: ParallelConfig, precision: str | None, hardware: Hardware) -> ScriptPlan:
    """ConfigError for what cannot run, with the flag to change."""
    device = "cuda" if hardware.gpus else "cpu"
    available = len(parallel.gpu_ids or hardware.gpus)
    processes = parallel.processes_per_node or available or 1
    if hardware.gpus and processes > available:
        raise ConfigError(f"--gpus-per-node is {processes}, but {available} GPUs are chosen: lower it.")
    world = parallel.nodes * processes
    strategy = parallel.strategy
    if strategy == "auto":
        strategy = "ddp" if world > 1 else "single"
    if strategy == "single" and world > 1:
        raise ConfigError(f"--strategy is single, but {world} ranks were asked for: set it to ddp, or use one rank.")
    if strategy == "fsdp" and device == "cpu":
        raise ConfigError(
            "--strategy is fsdp, which Accelerate does not choose on a CPU (it would train under DDP without a word): "
            "set it to ddp or zero3. Recipes can use fsdp on a CPU."
        )
    if precision == "fp16" and device == "cpu":
        raise ConfigError("--precision is fp16, which needs a GPU: set it to fp32 or bf16.")
    return ScriptPlan(
        device=device,
        strategy=strategy,
        precision=precision,
        offload=parallel.offload,
        nodes=parallel.nodes,
        processes_per_node=processes,
        threads_per_process=max(1, hardware.cores // processes),
        gpu_ids=tuple(parallel.gpu_ids or ()),
    )


def _run(directory: RunDir, plan: ScriptPlan, hardware: Hardware, command: list[str], team: Team | None = None) -> None:
    attempt = current_attempt(directory.events) + 1
    log_event(directory.events, "run_started", attempt=attempt, pid=os.getpid(), world_size=plan.world_size)
    rendezvous = None if team is None else team.begin(directory, attempt, [])
    started, environment = _ranks(directory, plan, hardware, command, attempt, rendezvous)
    record_commands(directory, command_lines(started).replace("{attempt}", str(attempt)))
    precision = plan.precision or "the script's precision"
    print(f"run directory  {directory.path}")
    print(f"plan           {plan.world_size} x {plan.device}, {plan.strategy}, {precision}")
    if plan.device == "cpu" and plan.strategy.startswith("zero"):
        print("note           the Hugging Face Trainer finds its ranks under ZeRO on a CPU with use_cpu=True alone")
    print(f"logs           {directory.logs}; of rank 0 also here:", flush=True)
    tail = LogTail(directory.rank_log(0))
    try:
        lead(Supervisor(directory, attempt, own_script=True), started, environment, tail, team)
    except ToolkitError as error:
        tell_end(directory, attempt, error)
        raise
    log_event(directory.events, "finished", attempt=attempt)
    print(f"done           {directory.path}")


def _check_script(command: list[str]) -> None:
    """The script is there. A module can only be looked for by the ranks, on their path."""
    if command[0] == "-m":
        return
    path = Path(command[0])
    if not path.is_file():
        what = "it is a folder" if path.is_dir() else "there is no such file"
        hint = (
            f" To run a module: dist-train launch -m {command[0]}"
            if re.fullmatch(r"[\w.]+(?<!\.py)", command[0])
            else ""
        )
        raise ConfigError(f"{command[0]} cannot be run: {what}.{hint}")


def _directory(command: list[str], name: str | None, output_dir: str | None) -> RunDir:
    if name is not None and not _NAME.fullmatch(name):
        raise ConfigError(f"--name is {name!r}, but only letters, digits, '.', '_' and '-' are allowed.")
    folder = Path(output_dir or config_io.site_output_dir() or "runs").expanduser()
    stem = command[1] if command[0] == "-m" else Path(command[0]).stem
    return RunDir(folder / (name or free_name(re.sub(r"[^A-Za-z0-9._-]", "_", stem).lstrip("._-") or "script")))


def _parallel(options: dict[str, Any]) -> ParallelConfig:
    ids = options["gpu_ids"]
    try:
        return ParallelConfig(
            strategy=options["strategy"],
            offload=options["offload"],
            nodes=options["nodes"],
            processes_per_node=options["gpus_per_node"],
            gpu_ids=None if ids is None else [word.strip() for word in ids.split(",")],
            deepspeed_config=_absolute(options["deepspeed_config"]),
            accelerate_config=_absolute(options["accelerate_config"]),
        )
    except ValidationError as error:
        message = "\n".join(str(entry["ctx"]["error"]) if "ctx" in entry else entry["msg"] for entry in error.errors())
        for key, flag in SCRIPT_FLAGS.items():
            message = message.replace(key, flag)
        raise ConfigError(message) from None


def _absolute(path: str | None) -> Path | None:
    return None if path is None else Path(path).expanduser().absolute()


def _base_file(path: Path | None, read: Any) -> tuple[str, dict[str, Any] | None]:
    """(the file's name in messages, what it holds)"""
    if path is None:
        return "", None
    shown = deepspeed_base.shown_path(path)
    return shown, read(path, shown)


def _settings(parallel: ParallelConfig, precision: str | None) -> Settings:
    values = {f"parallel.{name}": value for name, value in parallel.model_dump().items()}
    given = {f"parallel.{name}" for name, value in parallel if value != ParallelConfig.model_fields[name].default}
    return Settings(
        {**values, "train.precision": precision},
        dict.fromkeys([*given, "train.precision"], "command line"),
        SCRIPT_FLAGS,
    )
