"""A user's own DeepSpeed JSON, Accelerate file and launcher, held against the recipe."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml

from dist_train import config_io, deepspeed_base, launcher_settings
from dist_train.config_io import Loaded
from dist_train.contradictions import SCRIPT_FLAGS, Settings, read_json_table
from dist_train.deepspeed_config import deepspeed_config, script_deepspeed_config, value_at
from dist_train.errors import ConfigError, UnsafeInputError
from dist_train.plan import LaunchPlan, make_plan
from dist_train.rundir import RunDir
from dist_train.start_run import Start
from launcher import accelerate_base
from launcher.accelerate_config import accelerate_config
from tests.fakes import TinyConfig
from tests.test_dist_train_plan import CPU, NODE


def _start(strategy: str = "zero3", gpus: bool = True, **sections: Any) -> Start:
    parallel = {"strategy": strategy, "processes_per_node": 2, **sections.pop("parallel", {})}
    train = {"steps": 40, "micro_batch_size": 8, **sections.pop("train", {})}
    config = TinyConfig(recipe="tiny", train=train, parallel=parallel, **sections)
    hardware = NODE if gpus else CPU
    settings = Settings(
        config_io.flatten(config), {"parallel.strategy": "command line", "train.precision": "mine.yaml:7"}
    )
    return Start(RunDir("/r"), config, make_plan(config, hardware, 1000), hardware, settings)


def _problems(base: dict[str, Any], start: Start) -> list[str]:
    return deepspeed_base.check(base, "my_ds.json", start.plan, start.config.optim.clip_norm, start.settings)


def test_keys_that_the_recipe_does_not_decide_are_kept_and_auto_is_filled() -> None:
    start = _start()
    base = {
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": 5e8,
            "stage3_param_persistence_threshold": "auto",
            "sub_group_size": "auto",
            "offload_optimizer": {"device": "none", "pin_memory": True},
        },
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": False, "loss_scale": 0},
        "comms_logger": {"enabled": True, "verbose": False},
        "wall_clock_breakdown": True,
    }
    assert _problems(base, start) == []
    merged = deepspeed_config(start.plan, 0.5, base)
    assert value_at(merged, "zero_optimization.reduce_bucket_size") == 5e8
    assert merged["comms_logger"] == {"enabled": True, "verbose": False}
    assert merged["wall_clock_breakdown"] is True
    assert (merged["train_batch_size"], merged["gradient_clipping"]) == (64, 0.5)
    assert value_at(merged, "zero_optimization.stage3_param_persistence_threshold") == 10_000
    assert not {"bf16", "fp16"} & set(merged)
    assert '"auto"' not in json.dumps(merged)
    assert value_at(merged, "zero_optimization.offload_optimizer.device") in (None, "none")


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (
            {"zero_optimization": {"stage": 2}},
            "my_ds.json: zero_optimization.stage is 2, but parallel.strategy is zero3 (command line), which makes it "
            '3: set it to 3 or "auto" in the file, or parallel.strategy to zero2.',
        ),
        ({"train_batch_size": 32}, "train_batch_size is 32, but train.global_batch_size is 64 (the default)"),
        ({"gradient_clipping": 0.3}, "but optim.clip_norm is 1.0 (the default), which makes it 1.0"),
        ({"gradient_accumulation_steps": 2}, "but train.micro_batch_size is 8 (the default), which makes it 4"),
        ({"bf16": {"enabled": True}}, "bf16.enabled is true, which casts the parameters, but train.precision is auto"),
        (
            {"torch_autocast": {"enabled": False}},
            "torch_autocast.enabled is false, but train.precision is auto (mine.yaml:7), here bf16",
        ),
        ({"communication_data_type": "fp16"}, "but parallel.communication is fp32 (the default)"),
        ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, "but parallel.offload is null (the default)"),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, "offload_optimizer.device is nvme"),
        ({"optimizer": {"type": "AdamW"}}, "optimizer is set, but the optimizer is the recipe's, optim.*: remove it"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler is set, but the schedule is the recipe's"),
        (
            {"zero_optimization": {"reduce_bucket": 5}},
            "no key that this DeepSpeed knows. Did you mean reduce_bucket_size?",
        ),
        ({"zero_optimization": {"zero_quantized_weights": True}}, "it changes the result"),
        ({"zero_optimization": {"round_robin_gradients": True}}, "the checkpoints do not know its shards"),
        ({"zero_optimization": [2]}, "zero_optimization is [2], but holds a group of keys"),
        ({"activation_checkpointing": {"number_checkpoints": "auto"}}, 'is "auto", but nothing here fills it'),
    ],
)
def test_a_deepspeed_key_that_contradicts_the_recipe_names_both_places(base: dict[str, Any], message: str) -> None:
    problems = _problems(base, _start())
    assert len(problems) == 1, problems
    assert message in problems[0]


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        (pickle.dumps({"zero_optimization": {"stage": 3}}), UnsafeInputError, "a pickle or an archive"),
        (b'{"a": 1, "a": 2}', ConfigError, "the key a stands twice"),
        (b"{'a': 1}", ConfigError, "not valid JSON"),
        (b'{"a": NaN}', ConfigError, "NaN is no JSON number"),
        (b"[1]", ConfigError, "a JSON object is expected"),
        (b"\xff\xfe{", ConfigError, "not UTF-8"),
        (b'{"a": ' + b"[" * 100_000, UnsafeInputError, "levels lie in each other"),
        (b" " * (2 << 20), UnsafeInputError, "larger than 1 MiB"),
    ],
)
def test_a_file_that_is_no_small_json_is_refused(
    content: bytes, kind: type[Exception], message: str, tmp_path: Path
) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(kind, match=message):
        read_json_table(tmp_path / "x.json", "x.json")


def test_a_script_keeps_its_own_optimizer_and_batches_but_not_another_stage() -> None:
    settings = Settings(
        {"parallel.strategy": "zero2", "parallel.offload": None, "train.precision": "bf16"},
        {"parallel.strategy": "command line", "train.precision": "command line"},
        SCRIPT_FLAGS,
    )
    ours = script_deepspeed_config("zero2", None, "cuda", "bf16")
    base = {"train_micro_batch_size_per_gpu": 4, "optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}
    assert deepspeed_base.check_for_script(base, "ds.json", ours, settings) == []
    merged = script_deepspeed_config("zero2", None, "cuda", "bf16", base)
    assert merged["train_micro_batch_size_per_gpu"] == 4
    assert merged["optimizer"]["params"] == {"lr": "auto"}
    problems = deepspeed_base.check_for_script(
        {"zero_optimization": {"stage": 3}, "fp16": {"enabled": True}}, "ds.json", ours, settings
    )
    assert "zero_optimization.stage is 3, but --strategy is zero2 (command line)" in problems[0]
    assert "or --strategy to zero3" in problems[0]
    assert "fp16 is set, but --precision is bf16 (command line)" in problems[1]


def _accelerate_problems(text: str, start: Start, tmp_path: Path) -> list[str]:
    (tmp_path / "mine.yaml").write_text(text)
    base = accelerate_base.read_accelerate_base(tmp_path / "mine.yaml", "mine.yaml")
    ours = accelerate_config(start.plan, start.directory.deepspeed_config)
    zero = start.plan.strategy.startswith("zero")
    deepspeed = deepspeed_config(start.plan, start.config.optim.clip_norm) if zero else None
    return accelerate_base.check(base, "mine.yaml", ours, deepspeed, start.settings)


def test_an_accelerate_file_that_agrees_is_a_base(tmp_path: Path) -> None:
    start = _start()
    text = """
compute_environment: LOCAL_MACHINE
distributed_type: DEEPSPEED
deepspeed_config: {zero_stage: 3, gradient_clipping: 1.0, gradient_accumulation_steps: auto, zero3_init_flag: true}
mixed_precision: bf16
num_processes: 2
main_process_port: 29999
rdzv_backend: c10d
"""
    assert _accelerate_problems(text, start, tmp_path) == []
    merged = accelerate_base.on_top(yaml.safe_load(text), accelerate_config(start.plan, Path("/r/deepspeed.json")))
    assert (merged["main_process_port"], merged["rdzv_backend"], merged["num_processes"]) == (29999, "c10d", 2)
    # Accelerate refuses these beside the JSON, which holds them.
    assert not {"zero_stage", "gradient_clipping"} & set(merged["deepspeed_config"])
    assert "mixed_precision" not in merged
    assert merged["deepspeed_config"]["deepspeed_config_file"] == "/r/deepspeed.json"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "distributed_type: FSDP",
            "distributed_type is FSDP, but parallel.strategy is zero3 (command line), which makes",
        ),
        (
            "num_processes: 8",
            "num_processes is 8, but parallel.processes_per_node is 2 (the default), which makes it 2",
        ),
        (
            "mixed_precision: no",
            "mixed_precision is no, but train.precision is auto (mine.yaml:7), which makes it bf16",
        ),
        ("deepspeed_config: {zero_stage: 2}", "deepspeed_config.zero_stage is 2, but parallel.strategy is zero3"),
        (
            "deepspeed_config: {offload_param_device: cpu}",
            "but parallel.offload is null (the default), which makes it none",
        ),
        ("deepspeed_config: {deepspeed_config_file: x}", "give yours as parallel.deepspeed_config, and remove the key"),
        ("use_cpu: true", "use_cpu is true, but there are GPUs"),
        ("gpu_ids: 0,1", "which GPUs are used is parallel.gpu_ids"),
        ("dynamo_config: {dynamo_backend: INDUCTOR}", "but compilation is train.compile"),
        ("mpirun_config: {mpirun_hostfile: x}", "the ranks are not started by MPI here"),
        ("num_process: 2", "num_process is no key of an Accelerate config. Did you mean num_processes?"),
        ("compute_environment: AMAZON_SAGEMAKER", "must be LOCAL_MACHINE"),
    ],
)
def test_an_accelerate_key_that_contradicts_the_recipe_names_both_places(
    text: str, message: str, tmp_path: Path
) -> None:
    problems = _accelerate_problems(text, _start(), tmp_path)
    assert len(problems) == 1, problems
    assert message in problems[0]
    assert problems[0].startswith("mine.yaml: ")


def test_an_accelerate_file_is_plain_data(tmp_path: Path) -> None:
    with pytest.raises(UnsafeInputError, match="the tag"):
        _accelerate_problems("debug: !!python/name:os.system", _start(), tmp_path)


@pytest.mark.parametrize(
    ("strategy", "variables", "message"),
    [
        ("ddp", {}, None),
        ("ddp", {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"}, None),
        ("ddp", {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "7"}, None),
        (
            "ddp",
            {"ACCELERATE_MIXED_PRECISION": "fp16"},
            "is fp16, but train.precision is auto (mine.yaml:7), here bf16",
        ),
        ("ddp", {"ACCELERATE_MIXED_PRECISION": "fp8"}, "ACCELERATE_MIXED_PRECISION is fp8"),
        ("ddp", {"ACCELERATE_USE_DEEPSPEED": "true"}, "but parallel.strategy is ddp (command line): start without"),
        ("ddp", {"ACCELERATE_USE_FSDP": "true"}, "ACCELERATE_USE_FSDP is true, but parallel.strategy is ddp"),
        ("ddp", {"ACCELERATE_USE_MEGATRON_LM": "true"}, "start without Megatron-LM"),
        ("ddp", {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "but train.compile is false"),
        ("fsdp", {"ACCELERATE_USE_FSDP": "true", "FSDP_OFFLOAD_PARAMS": "false"}, None),
        ("fsdp", {"ACCELERATE_USE_FSDP": "true", "FSDP_OFFLOAD_PARAMS": "true"}, "FSDP_OFFLOAD_PARAMS is true"),
        ("zero2", {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, None),
        (
            "zero2",
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
            "start with --zero_stage 2",
        ),
        ("zero2", {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_GRADIENT_CLIPPING": "1.0"}, None),
        (
            "zero2",
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_GRADIENT_CLIPPING": "0.1"},
            "but optim.clip_norm is 1.0",
        ),
        (
            "zero2",
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"},
            "or set parallel.offload to optimizer",
        ),
        (
            "zero2",
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "7"},
            "4 micro-batches follow from it",
        ),
    ],
)
def test_what_accelerate_launch_was_told_is_held_against_the_recipe(
    strategy: str, variables: dict[str, str], message: str | None
) -> None:
    problems = [*launcher_settings.contradictions(variables, _start(strategy))]
    assert len(problems) == (message is not None), problems
    if message is not None:
        assert message in problems[0]


def test_the_launcher_says_how_many_nodes_there_are_and_its_deepspeed_file_is_the_base(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", "/x/ds.json")
    config = TinyConfig(recipe="tiny", train={"steps": 4}, parallel={"strategy": "zero2"})
    taken = launcher_settings.take_over(Loaded(config, {}, Path("x")))
    assert (taken.config.parallel.nodes, taken.config.parallel.deepspeed_config) == (2, Path("/x/ds.json"))
    assert taken.sources["parallel.deepspeed_config"] == "ACCELERATE_DEEPSPEED_CONFIG_FILE"
    plan: LaunchPlan = make_plan(taken.config, NODE, 1000, 4)
    assert (plan.nodes, plan.processes_per_node) == (2, 2)
    with pytest.raises(
        ConfigError, match=r"parallel.nodes is 1 \(a.yaml:3\), but the launcher started 4 ranks on 2 nodes"
    ):
        launcher_settings.take_over(Loaded(config, {"parallel.nodes": "a.yaml:3"}, Path("x")))
    other = config.model_copy(
        update={"parallel": config.parallel.model_copy(update={"nodes": 2, "deepspeed_config": Path("/y.json")})}
    )
    with pytest.raises(ConfigError, match=r"but parallel.deepspeed_config is /y.json \(command line\): keep one"):
        launcher_settings.take_over(Loaded(other, {"parallel.deepspeed_config": "command line"}, Path("x")))
