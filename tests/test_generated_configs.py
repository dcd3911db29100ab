"""What each strategy is started with: Accelerate YAML, DeepSpeed JSON, command line and environment, against records.

A record that fails shows the difference. If the change is meant: REFRESH_RECORDS=1 python -m pytest <this file>, and
look at `git diff tests/data/records`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from dist_train.config import ParallelConfig
from dist_train.deepspeed_base import ZERO_KEYS
from dist_train.deepspeed_config import deepspeed_config, script_deepspeed_config
from dist_train.plan import LaunchPlan, make_plan
from dist_train.rank_environment import settle_environment, settle_rank_variables
from dist_train.rundir import LAUNCHER_PID, RunDir, json_text
from launcher.accelerate_base import KNOWN
from launcher.accelerate_config import accelerate_config, launch_command, script_environment, worker_environment
from launcher.launch import plan_script
from tests.fakes import TinyConfig
from tests.test_dist_train_plan import CPU, NODE

RECORDS = Path(__file__).parent / "data" / "records"
REFRESH = bool(os.environ.get("REFRESH_RECORDS"))
RUN = RunDir("/runs/first")
HARDWARE = {"cpu": CPU, "cuda": NODE}
STRATEGIES = ["single", "ddp", "zero1", "zero2-offload", "zero3", "zero3-offload", "fsdp"]


def _plan(strategy: str, device: str, **train: Any) -> LaunchPlan:
    name, _, offloads = strategy.partition("-")
    offload = ("parameters" if name == "zero3" else "optimizer") if offloads else None
    parallel = {"strategy": name, "offload": offload, "processes_per_node": 1 if name == "single" else 2}
    train = {"steps": 40, "micro_batch_size": 8, "deterministic": device == "cuda", **train}
    return make_plan(TinyConfig(recipe="tiny", train=train, parallel=parallel), HARDWARE[device], 1000)


def _added(environment: dict[str, str]) -> dict[str, str]:
    """What differs from the launcher's own environment."""
    mine = {name: value for name, value in environment.items() if os.environ.get(name) != value}
    return {**mine, LAUNCHER_PID: "<pid>"}


def _record(
    plan: Any, module_arguments: tuple[str, ...], deepspeed: dict[str, Any] | None, extra: dict[str, str]
) -> str:
    module = module_arguments[0]
    command = " ".join(launch_command(plan, RUN, module_arguments[1:], module)).replace(sys.executable, "python")
    environment = _added(worker_environment(plan, HARDWARE[plan.device]) | extra)
    parts = {
        "command": command + "\n",
        "environment": "".join(f"{name}={value}\n" for name, value in sorted(environment.items())),
        "accelerate.yaml": yaml.safe_dump(accelerate_config(plan, RUN.deepspeed_config, module != "dist_train.worker")),
        "deepspeed.json": "none\n" if deepspeed is None else json_text(deepspeed),
    }
    return "\n".join(f"== {name}\n{text}" for name, text in parts.items())


def _compare(name: str, text: str) -> None:
    path = RECORDS / f"{name}.txt"
    if REFRESH:
        path.write_text(text)
    assert path.read_text() == text, f"{path} differs; if that is meant, see the top of {Path(__file__).name}"


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a user's shell without settings of ours; ninja lies on its path."""
    for name in list(os.environ):
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", "/usr/bin")
    monkeypatch.setattr("dist_train.rank_environment.shutil.which", lambda name, path=None: f"/usr/bin/{name}")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_recipe_is_started_as_recorded(strategy: str, device: str) -> None:
    plan = _plan(strategy, device)
    deepspeed = deepspeed_config(plan, 1.0) if strategy.startswith("zero") else None
    text = _record(plan, ("dist_train.worker",), deepspeed, {})
    assert '"auto"' not in text
    _compare(f"{strategy}-{device}", text)


@pytest.mark.parametrize(
    ("strategy", "device"),
    # fsdp on a CPU is refused: Accelerate does not choose it there.
    [(strategy, device) for strategy in ("single", "ddp", "zero3") for device in ("cpu", "cuda")] + [("fsdp", "cuda")],
)
def test_a_users_script_is_started_as_recorded(strategy: str, device: str) -> None:
    parallel = ParallelConfig(strategy=strategy, processes_per_node=1 if strategy == "single" else 2)
    plan = plan_script(parallel, "bf16" if device == "cuda" else None, HARDWARE[device])
    deepspeed = None
    if strategy.startswith("zero"):
        deepspeed = script_deepspeed_config(strategy, None, device, plan.precision)
    arguments = ("dist_train.user_script", "train.py", "--lr", "1e-3")
    _compare(f"script-{strategy}-{device}", _record(plan, arguments, deepspeed, script_environment(plan, RUN)))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("strategy", ["zero1", "zero2-offload", "zero3", "zero3-offload"])
def test_deepspeed_itself_reads_our_json(strategy: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    import torch
    from deepspeed.runtime.config import DeepSpeedConfig

    train = {"precision": precision, "global_batch_size": 64, "deterministic": False}
    plan = dataclasses.replace(_plan(strategy, "cuda", **train), processes_per_node=1)
    written = json.loads(json_text(deepspeed_config(plan, 0.5)))
    read = DeepSpeedConfig(written)
    assert read.zero_optimization_stage == int(strategy[4])
    assert (read.train_micro_batch_size_per_gpu, read.gradient_clipping, read.steps_per_print) == (8, 0.5, None)
    assert read.communication_data_type == torch.float32
    assert read.torch_autocast_enabled == (precision != "fp32")
    assert (
        read.torch_autocast_dtype == {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    )
    assert read.torch_autocast_lower_precision_safe_modules == []
    assert not read.float16_config.enabled
    assert not read.bfloat16_config.enabled
    assert (read.zero_config.offload_optimizer is not None) == ("offload" in strategy)
    assert (read.zero_config.offload_param is not None) == (strategy == "zero3-offload")
    assert read.zero_config.param_persistence_threshold == (10_000 if strategy.startswith("zero3") else 100_000)
    # Unknown keys at the top pass through DeepSpeed without a word: each of ours must be one that it reads.
    import inspect

    from deepspeed.runtime import config as source
    from deepspeed.runtime import constants

    names = {value for value in vars(constants).values() if isinstance(value, str)}
    for key in written:
        assert key in names or key in inspect.getsource(source), key


def test_the_lists_of_known_keys_are_those_of_the_installed_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from accelerate.commands.config.config_args import ClusterConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    assert {field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()} == ZERO_KEYS
    assert {field.name for field in dataclasses.fields(ClusterConfig)} == KNOWN


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_accelerate_itself_reads_our_yaml_and_sets_what_is_meant(
    strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate.commands import launch
    from accelerate.utils import launch as utils

    plan, run = _plan(strategy, "cuda"), RunDir(tmp_path)
    run.accelerate_config.write_text(yaml.safe_dump(accelerate_config(plan, run.deepspeed_config)))
    words = ["--config_file", str(run.accelerate_config), "-m", "dist_train.worker", "/r"]
    arguments, defaults, from_file = launch._validate_launch_command(launch.launch_command_parser().parse_args(words))
    assert arguments.num_processes == plan.world_size
    zero = strategy.startswith("zero")
    assert (arguments.use_deepspeed, arguments.use_fsdp) == (zero, strategy == "fsdp")
    if not zero:
        assert utils.prepare_multi_gpu_env(arguments)["ACCELERATE_MIXED_PRECISION"] == "bf16"
        return
    # As launch_command does it: from these Accelerate decides whether file and YAML contradict each other.
    fields = [*defaults.deepspeed_config, *(["mixed_precision"] if from_file else [])]
    arguments.deepspeed_fields_from_accelerate_config = ",".join(fields)
    environment = utils.prepare_deepspeed_cmd_env(arguments)[1]
    assert environment["ACCELERATE_DEEPSPEED_CONFIG_FILE"] == str(run.deepspeed_config)
    assert environment["ACCELERATE_DEEPSPEED_ZERO3_INIT"] == "false"
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    run.deepspeed_config.write_text(json_text(deepspeed_config(plan, 1.0)))
    for name, value in environment.items():
        if name.startswith("ACCELERATE_"):
            monkeypatch.setenv(name, value)
    from accelerate.utils import DeepSpeedPlugin

    plugin = DeepSpeedPlugin()
    assert (plugin.zero_stage, plugin.gradient_clipping) == (int(strategy[4]), 1.0)


def test_a_rank_keeps_nothing_that_accelerate_would_take_from_another_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "FSDP_VERSION"):
        monkeypatch.setenv(name, "2")
    monkeypatch.setenv("ACCELERATE_LOG_LEVEL", "info")
    settle_environment("cpu", "zero1", deterministic=False)
    assert {name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))} == {"ACCELERATE_LOG_LEVEL"}
    assert os.environ.pop("DS_ACCELERATOR") == "cpu"


def test_ranks_of_mpi_are_known_by_torchs_names() -> None:
    environment = {
        "OMPI_COMM_WORLD_RANK": "3",
        "OMPI_COMM_WORLD_SIZE": "4",
        "OMPI_COMM_WORLD_LOCAL_RANK": "1",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    }
    settled = dict(environment)
    settle_rank_variables(settled)
    expected = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert settled == {**environment, **expected}
    ours = {**environment, LAUNCHER_PID: "1"}
    settle_rank_variables(ours)
    assert "RANK" not in ours
