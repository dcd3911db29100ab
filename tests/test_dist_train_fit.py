"""What fits is chosen, what does not is refused with the nearest change that would: hardware that need not be here."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dist_train.errors import ConfigError
from dist_train.fit import ModelFacts, largest_shapes
from dist_train.hardware import Gpu, Hardware
from dist_train.model_profile import ModelProfile, Parameter, Timeline
from dist_train.plan import LaunchPlan, make_plan
from tests.fakes import TinyConfig

GIB = 2**30
LENGTHS = np.full(1000, 16)


def _profile(checkpointing: bool, parameters: int = 2**28, row_bytes: int = GIB // 4) -> ModelProfile:
    """A model of 1 GiB of weights in four blocks, whose activations take `row_bytes` a row; a quarter with
    checkpointing."""
    blocks = tuple(
        Parameter(f"block.{index}.weight", (1024, parameters // 4096), index, True, parameters // 4, index + 1)
        for index in range(4)
    )
    row = row_bytes // 4 if checkpointing else row_bytes
    forward = [(False, index, -1) for index in range(4)]
    backward = [(True, index, index) for index in reversed(range(4))]
    peaks = [[[rows * row] * 8] for rows in (1, 2)]
    line = Timeline(
        backward=tuple(one[0] for one in (*forward, *backward)),
        blocks=tuple(one[1] for one in (*forward, *backward)),
        gradients=tuple(one[2] for one in (*forward, *backward)),
        peaks=peaks,
        starts=peaks,
        kept=[[rows * row] for rows in (1, 2)],
    )
    return ModelProfile(blocks, 0, (1, 2), (16,), line, line, [[0], [0]], "made up")


def _plan(
    memory_gib: float,
    gpus: int = 8,
    nodes: int = 1,
    profile: Callable[[bool], ModelProfile] = _profile,
    **sections: Any,
) -> LaunchPlan:
    hardware = Hardware("planned", "", 64, 0.0, tuple(Gpu(i, f"p{i}", "made up", memory_gib) for i in range(gpus)))
    parallel = {"nodes": nodes, "processes_per_node": gpus, **sections.pop("parallel", {})}
    train = {"global_batch_size": 64, "steps": 10, **sections.pop("train", {})}
    config = TinyConfig(recipe="tiny", parallel=parallel, train=train, **sections)
    return make_plan(config, hardware, len(LENGTHS), facts=ModelFacts(profile, LENGTHS))


def test_the_least_sharding_that_fits_is_chosen() -> None:
    assert _plan(80).strategy == "ddp"
    less = _plan(5.5)
    assert less.strategy in ("zero1", "zero2")
    assert any(note.startswith("auto chose the least sharding that fits") and "ddp" in note for note in less.notes)
    assert _plan(3.2).strategy == "fsdp"
    assert [entry.strategy for entry in _plan(80).fits] == ["ddp", "zero1", "zero2", "fsdp", "zero3"]


def test_micro_batches_are_the_fewest_that_fit_and_stay_what_was_asked_for() -> None:
    assert _plan(80).micro_batches == 1
    tight = _plan(7.0, parallel={"strategy": "ddp"})
    assert tight.micro_batches > 1
    chosen = next(entry for entry in tight.fits if entry.strategy == "ddp")
    assert chosen.estimate.peak <= (tight.memory_budget or 0)
    assert _plan(80, train={"micro_batch_size": 2}).micro_batch_size == 2


@pytest.mark.parametrize(
    ("memory_gib", "gpus", "sections", "words"),
    [
        (7.0, 8, {"parallel": {"strategy": "ddp"}, "train": {"micro_batch_size": 8}}, "train.micro_batch_size=auto"),
        (5.3, 8, {"parallel": {"strategy": "ddp"}}, "parallel.strategy=auto"),
        (5.0, 1, {}, "parallel.offload=optimizer"),
        (1.8, 8, {}, "Nothing that can be set makes it fit; the least is"),
    ],
)
def test_what_cannot_fit_is_refused_with_the_nearest_change(
    memory_gib: float, gpus: int, sections: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match="the training does not fit") as refusal:
        _plan(memory_gib, gpus, **sections)
    assert words in str(refusal.value)


def test_where_the_evaluation_is_what_does_not_fit_its_batch_is_named() -> None:
    def profile(checkpointing: bool) -> ModelProfile:
        return replace(_profile(checkpointing), evaluation=[[GIB], [2 * GIB]])

    with pytest.raises(ConfigError, match=r"The nearest change: eval\.batch_size=64 would fit"):
        _plan(80, profile=profile, eval={"batch_size": 256})
    assert _plan(80, profile=profile, eval={"batch_size": 64}).strategy


@pytest.mark.parametrize("memory_gib", [2.6, 3.0, 3.5, 4.0, 4.5, 5.3])
@pytest.mark.parametrize(
    "sections",
    [
        {"parallel": {"strategy": "ddp"}, "train": {"micro_batch_size": 8}},
        {"parallel": {"strategy": "zero2", "offload": "optimizer"}},
        {"parallel": {"strategy": "ddp"}, "train": {"compile": True}},
    ],
)
def test_a_change_that_is_named_does_fit(memory_gib: float, sections: dict[str, Any]) -> None:
    try:
        _plan(memory_gib, **json.loads(json.dumps(sections)))
        return
    except ConfigError as error:
        words = re.findall(r"(parallel|train)\.(\w+)=(\w+)", str(error).splitlines()[-1])
    assert words
    changed = json.loads(json.dumps(sections))
    for section, key, value in words:
        changed.setdefault(section, {})[key] = {"true": True, "null": None}.get(value, value)
    assert _plan(memory_gib, **changed).strategy


def test_the_largest_micro_batches_are_those_that_the_partition_makes() -> None:
    lengths = np.array([1, 2, 3, 100] * 16)
    first, later = largest_shapes(lengths, 32, 0, 2, 2, 16)
    assert all(rows <= 16 for rows, _ in (*first, *later))
    assert max(longest for _, longest in first) == 100  # the longest rows come first
    for shapes in (first, later):
        assert not any(a != b and a[0] >= b[0] and a[1] >= b[1] for a in shapes for b in shapes)


def test_a_plan_with_its_estimates_is_the_same_after_it_was_written_and_read() -> None:
    plan = _plan(80)
    assert LaunchPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
