"""Which strategy and micro-batch fit into a rank's memory, and what to change where none does. Torch-free."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from dist_train.config import OptimConfig
from dist_train.data import Schedule, partition
from dist_train.errors import ConfigError
from dist_train.hardware import Hardware
from dist_train.memory import Estimate, estimate
from dist_train.memory_layout import Setting, Shapes
from dist_train.model_profile import ModelProfile

# Of a GPU's memory, what the plan may fill: the rest is for the allocator's fragmentation. And what CUDA, NCCL and the
# kernels take before the first tensor. Rules of thumb: never measured on a GPU by this project.
GPU_SHARE, GPU_RESERVE_BYTES = 0.92, 1 << 30
CPU_SHARE = 0.8
# Steps whose micro-batches are looked at for the largest one.
_STEPS_LOOKED_AT = 64

SHARDED = ("zero1", "zero2", "fsdp", "zero3")


@dataclass(frozen=True)
class Need:
    """What the memory depends on, as asked for."""

    world_size: int
    global_batch_size: int
    seed: int
    evaluation_rows: int
    optimizer_states: int
    ema: bool
    offload: str | None
    bf16_communication: bool
    overlaps: bool
    checkpointing: bool
    optim: OptimConfig
    """How the parameters are grouped."""
    compiles: bool = False
    host_bytes: int | None = None
    """What a rank may take of the CPU's memory for offload; None where it is not known."""


@dataclass(frozen=True)
class ModelFacts:
    """What is known of the model and the data."""

    profile: Callable[[bool], ModelProfile]
    """The profile with (True) and without activation checkpointing; may take seconds."""
    lengths: np.ndarray
    """Of the training rows."""


@dataclass(frozen=True)
class Fit:
    """One strategy at one number of micro-batches."""

    strategy: str
    micro_batches: int
    micro_batch_size: int
    estimate: Estimate
    fits: bool

    @staticmethod
    def from_json(value: dict[str, Any]) -> Fit:
        return Fit(**{**value, "estimate": Estimate.from_json(value["estimate"])})


def budget_bytes(hardware: Hardware, processes: int) -> int:
    """What one rank may hold."""
    if hardware.gpus:
        smallest = min(gpu.memory_gib for gpu in hardware.gpus)
        return int(GPU_SHARE * smallest * 2**30) - GPU_RESERVE_BYTES
    return int(CPU_SHARE * hardware.memory_gib * 2**30 / processes)


def fit(need: Need, facts: ModelFacts, strategy: str, micro_batches: int, cap: int, budget: int) -> Fit:
    """The estimate of one way, held against the budget."""
    shapes = largest_shapes(facts.lengths, need.global_batch_size, need.seed, need.world_size, micro_batches, cap)
    evaluation = (need.evaluation_rows, int(facts.lengths.max()))
    setting = setting_of(need, strategy, micro_batches, shapes, evaluation)
    seen = estimate(facts.profile(need.checkpointing), setting)
    fits = seen.peak <= budget and (need.host_bytes is None or seen.host <= need.host_bytes)
    return Fit(strategy, micro_batches, cap, seen, fits)


def smallest_accumulation(need: Need, facts: ModelFacts, strategy: str, at_least: int, budget: int) -> Fit:
    """The fewest micro-batches that fit; those of one row each when none does."""
    per_rank = -(-need.global_batch_size // need.world_size)
    last = None
    for count in _counts(at_least, per_rank):
        # The number of micro-batches bounds their size; a cap on rows beside it would cut the batch in another way.
        last = fit(need, facts, strategy, count, per_rank, budget)
        if last.fits:
            return last
    assert last is not None
    return last


def candidates(need: Need, asked: str) -> tuple[str, ...]:
    """The strategies that `parallel.strategy` leaves, from the least sharding to the most."""
    if asked != "auto":
        return (asked,)
    if need.world_size == 1:
        return ("single",)
    return ("ddp", *(name for name in SHARDED if not (name == "zero3" and need.compiles)))


def nearest_change(need: Need, facts: ModelFacts, fits: list[Fit], budget: int, free: bool) -> str:
    """The first change that would fit, with all keys to set; or that none does. free: micro_batch_size is auto."""
    least = min(fits, key=lambda entry: entry.estimate.peak)
    own = "" if free else "train.micro_batch_size=auto "
    whole = own + ("parallel.offload=null " if need.offload else "")
    plain = replace(need, offload=None)
    every = candidates(plain, "auto")
    if least.estimate.moment == "evaluation" and (smaller := _smaller_evaluation(need, facts, fits, budget)):
        return smaller
    recompute = "train.activation_checkpointing=true"
    trials = [] if free else [(own, need, tuple(entry.strategy for entry in fits))]
    trials.append((f"{whole}parallel.strategy=auto", plain, every))
    trials.append((f"{whole}parallel.strategy=auto {recompute}", replace(plain, checkpointing=True), every))
    for offload, strategy in (("optimizer", "zero2"), ("optimizer", "zero3"), ("parameters", "zero3")):
        if strategy == "zero3" and need.compiles:
            continue
        words = f"{own}parallel.strategy={strategy} parallel.offload={offload}"
        trials.append((words, replace(need, offload=offload), (strategy,)))
        trials.append((f"{words} {recompute}", replace(need, offload=offload, checkpointing=True), (strategy,)))
    for words, other, strategies in trials:
        for strategy in strategies:
            found = smallest_accumulation(other, facts, strategy, 1, budget)
            if found.fits:
                return (
                    f"The nearest change: {words.strip()} would fit ({_in_words(found)}, {gib(found.estimate.peak)})."
                )
    world = need.world_size
    while world < min(need.global_batch_size, 4096):
        world *= 2
        found = smallest_accumulation(replace(plain, world_size=world), facts, "fsdp", 1, budget)
        if found.fits:
            words = f"{whole}parallel.strategy=fsdp"
            return f"The nearest change: {world} ranks and {words} would fit ({gib(found.estimate.peak)} a rank)."
    return f"Nothing that can be set makes it fit; the least is {gib(least.estimate.peak)} ({_in_words(least)})."


def _smaller_evaluation(need: Need, facts: ModelFacts, fits: list[Fit], budget: int) -> str | None:
    """The most rows of an evaluation batch, halved again and again, with which the training fits as it is."""
    rows = need.evaluation_rows // 2
    while rows:
        for entry in fits:
            found = smallest_accumulation(replace(need, evaluation_rows=rows), facts, entry.strategy, 1, budget)
            if found.fits:
                return (
                    f"The evaluation needs the most. The nearest change: eval.batch_size={rows} would fit "
                    f"({_in_words(found)}, {gib(found.estimate.peak)})."
                )
        rows //= 2
    return None


def too_large(need: Need, facts: ModelFacts, fits: list[Fit], budget: int, free: bool) -> ConfigError:
    least = min(fits, key=lambda entry: entry.estimate.peak)
    host = ""
    if need.host_bytes is not None and least.estimate.host > need.host_bytes:
        host = f"; and {gib(least.estimate.host)} of the CPU's memory a rank, where {gib(need.host_bytes)} are free"
    return ConfigError(
        f"the training does not fit: {gib(least.estimate.peak)} a rank are needed ({_in_words(least)}), but "
        f"{gib(budget)} are free for it{host}.\n{nearest_change(need, facts, fits, budget, free)}"
    )


@lru_cache(maxsize=1024)
def _shapes(key: tuple[int, ...], micro_batches: int, world_size: int, cap: int) -> tuple[Shapes, Shapes]:
    """(rows, longest row) of the first micro-batch of each rank, and of the later ones."""
    lengths = np.array(key)
    parts = partition(lengths, world_size, micro_batches, cap)
    by_rank = [[(len(rows), int(lengths[rows].max())) for rows in rank if len(rows)] for rank in parts]
    first = {shape for shapes in by_rank for shape in shapes[:1]}
    return tuple(first), tuple({shape for shapes in by_rank for shape in shapes[1:]})


def largest_shapes(
    lengths: np.ndarray, global_batch_size: int, seed: int, world_size: int, micro_batches: int, cap: int
) -> tuple[Shapes, Shapes]:
    """(rows, longest row) of the first and of the later micro-batches of a step that no other one outdoes in both; over
    the first steps."""
    schedule = Schedule(len(lengths), global_batch_size, seed)
    first: set[tuple[int, int]] = set()
    later: set[tuple[int, int]] = set()
    for step in range(min(_STEPS_LOOKED_AT, schedule.steps_per_epoch)):
        chosen = lengths[schedule.rows_of(step)]
        count = max(1, -(-micro_batches * len(chosen) // global_batch_size))
        seen = _shapes(tuple(int(length) for length in chosen), count, world_size, cap)
        first.update(seen[0])
        later.update(seen[1])
    return _not_outdone(first), _not_outdone(later)


def _not_outdone(shapes: set[tuple[int, int]]) -> Shapes:
    return tuple(
        sorted(one for one in shapes if not any(o != one and o[0] >= one[0] and o[1] >= one[1] for o in shapes))
    )


def setting_of(
    need: Need, strategy: str, micro_batches: int, shapes: tuple[Shapes, Shapes], evaluation: tuple[int, int]
) -> Setting:
    """The memory formulas' words for a need. shapes: (first, later); each and evaluation: (rows, longest row)."""
    return Setting(
        strategy=strategy,
        world_size=need.world_size,
        micro_batches=micro_batches,
        first=shapes[0],
        later=shapes[1],
        evaluation=evaluation,
        optimizer_states=need.optimizer_states,
        ema=need.ema,
        offload=need.offload,
        bf16_communication=need.bf16_communication,
        overlaps=need.overlaps,
        optim=need.optim,
    )


def _counts(at_least: int, per_rank: int) -> list[int]:
    """Numbers of micro-batches to try: each one up to 8, then in steps of about a fifth."""
    counts, count = [], max(1, min(at_least, per_rank))
    while count < per_rank:
        counts.append(count)
        count = max(count + 1, count * 6 // 5)
    return [*counts, per_rank]


def _in_words(entry: Fit) -> str:
    return f"{entry.strategy}, {entry.micro_batches} micro-batch{'es' * (entry.micro_batches > 1)} a step"


def gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
