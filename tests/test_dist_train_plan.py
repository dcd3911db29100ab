"""The launch plan: arithmetic and refusals, before anything runs."""

from __future__ import annotations

from typing import Any

import pytest

from dist_train.errors import ConfigError
from dist_train.hardware import Gpu, Hardware, visible_gpus
from dist_train.plan import LaunchPlan, make_plan
from launcher.preflight import check_gpus
from tests.fakes import TinyConfig

CPU = Hardware("host", "cpu", 8, 16.0)
GPUS = tuple(Gpu(index, f"GPU-{letter * 8}", "H100", 80.0) for index, letter in enumerate("abcd"))
NODE = Hardware("host", "cpu", 32, 256.0, GPUS)


def _plan(hardware: Hardware = CPU, world_size: int | None = None, **sections: Any) -> LaunchPlan:
    sections.setdefault("train", {"global_batch_size": 64, "epochs": 3})
    return make_plan(TinyConfig(recipe="tiny", **sections), hardware, 1000, world_size)


def test_the_global_batch_is_made_of_ranks_and_micro_batches() -> None:
    train = {"global_batch_size": 64, "epochs": 3, "micro_batch_size": 8}
    plan = _plan(parallel={"processes_per_node": 2}, train=train)
    assert (plan.world_size, plan.micro_batches, plan.steps_per_epoch, plan.steps) == (2, 4, 16, 48)
    assert plan.equation == "64 samples a step = 2 ranks x 4 micro-batches x 8 (at most 8)"
    assert (plan.strategy, plan.device, plan.precision, plan.threads_per_process) == ("ddp", "cpu", "fp32", 4)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("cap", [1, 5, 64])
def test_micro_batches_hold_the_whole_batch_under_the_cap(world_size: int, cap: int) -> None:
    train = {"global_batch_size": 64, "epochs": 1, "micro_batch_size": cap}
    plan = _plan(parallel={"processes_per_node": world_size}, train=train)
    assert plan.world_size * plan.micro_batches * plan.micro_batch_size >= 64
    assert plan.micro_batch_size <= cap


def test_every_gpu_is_a_rank_in_bf16_with_one_micro_batch() -> None:
    plan = _plan(NODE)
    assert (plan.world_size, plan.device, plan.precision) == (4, "cuda", "bf16")
    assert (plan.micro_batches, plan.micro_batch_size) == (1, 16)
    assert _plan(NODE, parallel={"gpu_ids": ["1", "3"]}).world_size == 2


def test_shares_that_are_uneven_are_noted() -> None:
    plan = _plan(parallel={"processes_per_node": 3})
    assert any("64 samples do not divide by 3 ranks" in note for note in plan.notes)
    assert _plan(parallel={"processes_per_node": 2}).notes == ()


@pytest.mark.parametrize(
    ("hardware", "world_size", "sections", "words"),
    [
        (CPU, None, {"parallel": {"processes_per_node": 65}}, ["train.global_batch_size is 64", "65 ranks"]),
        (CPU, None, {"parallel": {"strategy": "single", "processes_per_node": 2}}, ["parallel.strategy is single"]),
        (CPU, None, {"train": {"epochs": 1, "precision": "fp16"}}, ["train.precision is fp16", "GPU"]),
        (CPU, None, {"train": {}}, ["train.steps and train.epochs are both null"]),
        (CPU, 3, {"parallel": {"processes_per_node": 2}}, ["is 2", "3 ranks"]),
        (NODE, None, {"parallel": {"processes_per_node": 5}}, ["processes_per_node is 5", "4 GPUs"]),
    ],
)
def test_what_cannot_run_is_refused_with_the_key_to_change(
    hardware: Hardware, world_size: int | None, sections: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as refusal:
        _plan(hardware, world_size, **sections)
    for word in words:
        assert word in str(refusal.value)


def test_a_plan_is_the_same_after_it_was_written_and_read() -> None:
    plan = _plan(NODE, parallel={"gpu_ids": ["1", "3"]}, train={"global_batch_size": 63, "steps": 7})
    assert LaunchPlan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize(
    ("visible", "indices"),
    [
        (None, [0, 1, 2, 3]),
        ("", []),
        ("2,0", [2, 0]),
        ("GPU-bbbb", [1]),
        ("GPU-cccccccc,0", [2, 0]),
        ("1,9,0", [1]),
        ("-1", []),
    ],
)
def test_cuda_visible_devices_chooses_and_orders(visible: str | None, indices: list[int]) -> None:
    assert [gpu.index for gpu in visible_gpus(GPUS, visible)] == indices


def test_gpus_that_the_environment_names_and_nobody_knows_are_refused() -> None:
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES is MIG-1, but the GPUs here are 0"):
        visible_gpus(GPUS, "MIG-1")
    assert visible_gpus(GPUS, "-1") == visible_gpus(GPUS, "") == ()
    assert visible_gpus((), "0") == ()


def test_more_ranks_than_chosen_gpus_and_a_gpu_named_twice_are_refused() -> None:
    with pytest.raises(ConfigError, match="processes_per_node is 4, but 2 GPUs are chosen"):
        _plan(NODE, parallel={"gpu_ids": ["0", "1"], "processes_per_node": 4})
    with pytest.raises(ConfigError, match="names a GPU twice"):
        check_gpus(_plan(NODE, parallel={"gpu_ids": ["0", "GPU-aaaa"]}), NODE)
