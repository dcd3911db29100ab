"""What one rank holds and sends under each strategy, in bytes: the arithmetic behind memory.py. Torch-free.

docs/memory.md says why each copy is there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from dist_train.config import OptimConfig
from dist_train.model_profile import NO_GRADIENT, OUTSIDE, ModelProfile, Parameter, Timeline
from dist_train.parameter_groups import Layers, group_parameters
from dist_train.zero_sizes import (
    REDUCE_BUCKET_SIZE,
    STAGE3_MAX_LIVE_PARAMETERS,
    STAGE3_MAX_REUSE_DISTANCE,
    STAGE3_PARAM_PERSISTENCE_THRESHOLD,
    STAGE3_PREFETCH_BUCKET_SIZE,
)

FP32 = 4
# DeepSpeed aligns each flat group to so many elements a rank (nccl_start_alignment_factor).
_ALIGNMENT = 2


Shapes = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Setting:
    """What the bytes depend on beside the model."""

    strategy: str
    world_size: int
    micro_batches: int
    first: Shapes
    """(rows, padded length) of the first micro-batches of a step that may be the largest."""
    later: Shapes
    """The same of all micro-batches after the first; they find gradients there."""
    evaluation: tuple[int, int]
    """(rows, padded length) of the largest batch in evaluation."""
    optim: OptimConfig
    """How the parameters are grouped."""
    optimizer_states: int = 2
    ema: bool = False
    offload: str | None = None
    bf16_communication: bool = False
    overlaps: bool = False
    """Whether collectives run beside the computation (GPUs): each buffer then exists twice."""


@dataclass
class Pass:
    """What a strategy holds in each interval of a forward and backward pass beside its lasting state, in bytes."""

    gradients: np.ndarray
    gathered: np.ndarray
    communication: np.ndarray
    later: bool = False
    """Of the micro-batches after the first."""
    at_start: bool = False
    """These stand when the interval begins, before its own temporaries."""


@dataclass
class Layout:
    """A strategy on one rank."""

    parameters: int
    optimizer: int
    copies: int = 0
    communication: int = 0
    passes: list[Pass] = field(default_factory=list)
    moments: list[tuple[str, int, int, int]] = field(default_factory=list)
    """(name, gradients, copies, communication) of the moments after the backward pass."""
    ema: int = 0
    sent: int = 0
    host: int = 0
    evaluation_gathered: int = 0
    cached: bool = True
    """Whether autocast's cache of cast weights is on."""


def _replicated(profile: ModelProfile, setting: Setting) -> Layout:
    """single and ddp. DDP's buckets hold the gradients all the time; while it does not synchronise (no_sync), the
    gradients gather outside of them first, and move into them in the last micro-batch."""
    trainable = FP32 * profile.trainable
    arrived = FP32 * _arrived(profile, profile.cached)
    nothing = np.zeros_like(arrived)
    distributed = setting.strategy == "ddp"
    buckets = trainable if distributed else 0
    more = setting.micro_batches > 1
    passes = [Pass(buckets + (nothing if distributed and not more else arrived), nothing, nothing)]
    if more and not distributed:
        passes.append(Pass(nothing + trainable, nothing, nothing, later=True))
    if more and distributed:
        passes.append(Pass(2 * trainable - arrived, nothing, nothing, later=True))
    if setting.micro_batches > 2 and distributed:
        passes.append(Pass(nothing + 2 * trainable, nothing, nothing, later=True))
    wire = trainable // 2 if setting.bf16_communication else trainable
    return Layout(
        parameters=FP32 * profile.numel,
        optimizer=FP32 * setting.optimizer_states * profile.trainable,
        ema=FP32 * profile.numel * setting.ema,
        passes=passes,
        moments=[("optimizer step", trainable, 0, 0)],
        sent=_ring(2 * wire, setting.world_size) if distributed else 0,
    )


def _zero12(profile: ModelProfile, setting: Setting) -> Layout:
    """The weights lie in flat groups (see `group_parameters`); each rank has a clone of its partition of each, with the
    optimizer's state. Gradients are copied into a bucket, summed from a flat copy of it, and what belongs to this
    rank's partition is copied out: after the last backward pass (zero1) or within each (zero2)."""
    world, stage, more = setting.world_size, int(setting.strategy[-1]), setting.micro_batches > 1
    offloaded = setting.offload is not None
    groups = _flat_groups(profile, setting.optim)
    parts = [_flat_partition(group, world) for group in groups]
    partition, trainable = FP32 * sum(parts), FP32 * profile.trainable
    own = 0 if offloaded else FP32 * max(_touched(groups, world, rank) for rank in range(world))
    buckets = FP32 * REDUCE_BUCKET_SIZE * (2 if setting.overlaps else 1)
    arrived = FP32 * _arrived(profile, profile.cached)
    nothing = np.zeros_like(arrived)
    waiting = np.where(np.array(profile.cached.backward), buckets, 0.0)
    if stage == 1:
        passes = [Pass(arrived, nothing, waiting)]
        if more:
            passes.append(Pass(nothing + trainable, nothing, nothing + buckets, later=True))
        order = [parameter.numel for group in groups for parameter in group]
        moments = [("reduction", FP32 * held, 0, buckets + FP32 * copy) for held, copy in _drain(order, own // FP32)]
        moments.append(("reduction", own, 0, buckets))
    else:
        flush = _Flushes(profile, profile.cached)
        held = own * flush.flushed_before + FP32 * flush.oversized
        passes = [Pass(held, nothing, waiting + FP32 * flush.copies)]
        before = own if more else 0
        if more:
            passes.append(Pass(held + own, nothing, waiting + FP32 * flush.copies, later=True))
        at_end = before + own * flush.any + FP32 * flush.oversized_at_end
        moments = [("reduction", at_end, 0, buckets + FP32 * flush.rest), ("reduction", own + before, 0, buckets)]
    moments.append(("optimizer step", own, 0 if offloaded else FP32 * max(parts, default=0), 0))
    wire = trainable // (2 if setting.bf16_communication else 1)
    optimizer = setting.optimizer_states * partition
    largest = FP32 * max((p.numel for p in profile.parameters if p.trainable), default=0)
    return Layout(
        parameters=world * partition + FP32 * (profile.numel - profile.trainable),
        optimizer=0 if offloaded else optimizer,
        copies=largest if offloaded else partition,
        ema=FP32 * profile.numel * setting.ema,
        passes=passes,
        moments=moments,
        sent=_ring((setting.micro_batches if stage == 2 else 1) * 2 * wire + trainable, world),
        host=optimizer + 3 * partition if offloaded else 0,
    )


def _zero3(profile: ModelProfile, setting: Setting) -> Layout:
    """Each tensor's share of ceil(numel / world) elements lies in one flat buffer, with an fp32 clone, and its
    gradients in another; small tensors stay whole as well. Modules' weights are gathered ahead up to the most that may
    live, and kept from the forward to the backward pass where they come back within the reuse distance."""
    world, timeline, offloaded = setting.world_size, profile.cached, setting.offload is not None
    share = FP32 * sum(-(-p.numel // world) for p in profile.parameters)
    trained = FP32 * sum(-(-p.numel // world) for p in profile.parameters if p.trainable)
    small = FP32 * sum(p.numel for p in profile.parameters if p.numel <= STAGE3_PARAM_PERSISTENCE_THRESHOLD)
    gathered, coming = _gathered_zero3(profile, timeline)
    flush = _Flushes(profile, timeline)
    gradients = np.zeros_like(gathered) + (0 if offloaded else trained) + FP32 * flush.oversized
    optimizer = setting.optimizer_states * trained
    groups = _flat_groups(profile, setting.optim)
    sub_group = max((sum(-(-p.numel // world) for p in group) for group in groups), default=0)
    outside = sum(p.numel for p in profile.parameters if p.block == OUTSIDE)
    moving = coming + flush.copies
    at_end = (0 if offloaded else trained) + FP32 * flush.oversized_at_end
    wire = FP32 * profile.trainable // (2 if setting.bf16_communication else 1)
    on_host = share if setting.offload == "parameters" else 0
    return Layout(
        parameters=share - on_host,
        optimizer=0 if offloaded else optimizer,
        copies=small + (0 if offloaded else trained),
        communication=FP32 * REDUCE_BUCKET_SIZE,
        ema=share * setting.ema,
        passes=[
            Pass(gradients, FP32 * gathered, FP32 * moving, later=later)
            for later in (False, True)[: setting.micro_batches]
        ],
        moments=[
            ("reduction", at_end, FP32 * min(outside, STAGE3_MAX_LIVE_PARAMETERS), FP32 * flush.rest),
            ("optimizer step", 0 if offloaded else trained, 0 if offloaded else FP32 * sub_group, 0),
        ],
        evaluation_gathered=int(FP32 * (gathered + coming).max(initial=0.0)),
        sent=setting.micro_batches * _ring(2 * FP32 * profile.numel + wire, world),
        host=optimizer + 2 * trained + on_host if offloaded else 0,
    )


def _fsdp(profile: ModelProfile, setting: Setting) -> Layout:
    """Each tensor's rows are dealt out (ceil(rows / world) on the fullest rank). A block's weights are gathered when it
    runs and dropped after it; what lies outside the blocks stays gathered until the backward pass ends."""
    world = setting.world_size
    share = FP32 * sum(_rows_share(p.shape, world) for p in profile.parameters)
    trained = FP32 * sum(_rows_share(p.shape, world) for p in profile.parameters if p.trainable)
    units = _Units(profile, world)
    passes = units.passes(setting, False) + (units.passes(setting, True) if setting.micro_batches > 1 else [])
    inner = sum(parameter.numel for parameter in profile.parameters if parameter.block != OUTSIDE)
    wire = FP32 * profile.trainable // (2 if setting.bf16_communication else 1)
    last = FP32 * units.shares[OUTSIDE]
    return Layout(
        parameters=share,
        optimizer=setting.optimizer_states * trained,
        ema=share * setting.ema,
        cached=False,
        passes=passes,
        moments=[
            # The root's whole gradients, the flat copy that is summed, and this rank's part of it.
            ("reduction", trained - last + FP32 * units.trainable[OUTSIDE], 0, (world + 1) * last),
            ("optimizer step", trained, 0, 0),
        ],
        evaluation_gathered=FP32 * (units.whole[OUTSIDE] + (3 if setting.overlaps else 2) * units.largest),
        sent=setting.micro_batches * _ring(FP32 * (profile.numel + inner) + wire, world),
    )


class _Units:
    """What fully_shard gathers and reduces at once: each block, and the root with all else. In elements."""

    def __init__(self, profile: ModelProfile, world: int) -> None:
        self.profile, self.world = profile, world
        blocks = range(OUTSIDE, max((p.block for p in profile.parameters), default=OUTSIDE) + 1)
        self.whole, self.shares = dict.fromkeys(blocks, 0), dict.fromkeys(blocks, 0)
        self.trainable = dict.fromkeys(blocks, 0)
        for parameter in profile.parameters:
            share = _rows_share(parameter.shape, world)
            self.whole[parameter.block] += world * share
            if parameter.trainable:
                self.shares[parameter.block] += share
                self.trainable[parameter.block] += parameter.numel
        self.largest = max((size for block, size in self.whole.items() if block != OUTSIDE), default=0)

    def passes(self, setting: Setting, later: bool) -> list[Pass]:
        """What stands while each interval runs, and what stands as it begins."""
        timeline = self.profile.timeline(False)
        size, outside = len(timeline.blocks), self.whole[OUTSIDE]
        during, between = (Pass(np.zeros(size), np.zeros(size), np.zeros(size), later) for _ in range(2))
        between.at_start = True
        arrived = dict.fromkeys(self.whole, 0)
        sharded = sum(self.shares.values()) if later else 0
        ended = OUTSIDE  # the block whose backward pass was the last
        for interval, (block, backward) in enumerate(zip(timeline.blocks, timeline.backward, strict=True)):
            inside = self.whole[block] if block != OUTSIDE else 0
            ahead = self.whole.get(block - 1, 0) if backward and block > 0 else 0
            if not backward and setting.overlaps and inside:
                # The next block's flat buffer is filled beside the computation, this one's waits for its stream.
                ahead = 2 * self.whole.get(block + 1, 0)
            if backward and block != ended and ended != OUTSIDE and arrived[ended]:
                # A flat copy of the whole gradients is summed; this rank's part joins the others'.
                between.communication[interval] = self.world * self.shares[ended] + self.shares[ended] + ahead
                between.gathered[interval] = outside
                between.gradients[interval] = sharded + sum(arrived.values())
                arrived[ended] = 0
                sharded += 0 if later else self.shares[ended]
            elif inside:
                # The flat buffer of the gather and the weights that are copied out of it; in a forward pass the buffer
                # of the gather before is let go only then.
                kept = 0 if backward else self.whole[block - 1]
                between.gathered[interval], between.communication[interval] = outside + inside, inside + kept
                between.gradients[interval] = sharded + sum(arrived.values())
            during.gathered[interval] = outside + inside
            # The block before is gathered, and the sum of the block after is not yet waited for.
            summed = self.world * self.shares[ended] if backward and ended not in (OUTSIDE, block) else 0
            during.communication[interval] = ahead + summed
            during.gradients[interval] = sharded + sum(arrived.values())
            index = timeline.gradients[interval]
            if index != NO_GRADIENT:
                arrived[self.profile.parameters[index].block] += self.profile.parameters[index].numel
            if backward and block != OUTSIDE:
                ended = block
        for one in (during, between):
            for values in (one.gradients, one.gathered, one.communication):
                values *= FP32
        return [during, between]


LAYOUTS: dict[str, Callable[[ModelProfile, Setting], Layout]] = {
    "single": _replicated,
    "ddp": _replicated,
    "zero1": _zero12,
    "zero2": _zero12,
    "zero3": _zero3,
    "fsdp": _fsdp,
}


def _arrived(profile: ModelProfile, timeline: Timeline) -> np.ndarray:
    """Elements of the gradients that were finished before each interval."""
    sizes = [0 if index == NO_GRADIENT else profile.parameters[index].numel for index in timeline.gradients]
    return np.concatenate([[0.0], np.cumsum(sizes, dtype=np.float64)[:-1]])


def _ring(size: int, world: int) -> int:
    """What a rank sends when `size` bytes are gathered, or scattered, around a ring; twice that for an all-reduce."""
    return size * (world - 1) // world


def _flat_groups(profile: ModelProfile, optim: OptimConfig) -> list[list[Parameter]]:
    """The optimizer's groups."""
    trained = {parameter.name: parameter for parameter in profile.parameters if parameter.trainable}
    num_blocks = max((parameter.block for parameter in profile.parameters), default=OUTSIDE) + 1
    layers = Layers({name: parameter.depth for name, parameter in trained.items()}, num_blocks)
    groups = group_parameters([(name, len(parameter.shape)) for name, parameter in trained.items()], layers, optim)
    return [[trained[name] for name in group.names] for group in groups]


def _flat_partition(group: list[Parameter], world: int) -> int:
    """Elements of one rank's partition of a flat group, its padding included."""
    total = sum(parameter.numel for parameter in group)
    return -(-total // (_ALIGNMENT * world)) * _ALIGNMENT


def _touched(groups: list[list[Parameter]], world: int, rank: int) -> int:
    """Elements of the tensors of which a part lies in the rank's partitions: their gradients are kept whole."""
    touched = 0
    for group in groups:
        size, offset = _flat_partition(group, world), 0
        for parameter in group:
            if offset < (rank + 1) * size and offset + parameter.numel > rank * size:
                touched += parameter.numel
            offset += parameter.numel
    return touched


class _Flushes:
    """DeepSpeed's bucket in each interval of a backward pass, in elements. A gradient that finds no room has the bucket
    summed first, from a flat copy; one larger than the bucket waits outside of it for the next flush."""

    def __init__(self, profile: ModelProfile, timeline: Timeline) -> None:
        size = len(timeline.gradients)
        self.copies, self.oversized, self.flushed_before = np.zeros(size), np.zeros(size), np.zeros(size)
        self.any = False
        inside = outsized = 0
        for interval, index in enumerate(timeline.gradients):
            self.flushed_before[interval] = self.any
            self.oversized[interval] = outsized
            if index == NO_GRADIENT:
                continue
            numel = profile.parameters[index].numel
            if inside + numel > REDUCE_BUCKET_SIZE and inside:
                self.copies[interval], self.any, inside, outsized = inside, True, 0, 0
            inside += numel
            outsized = numel if numel > REDUCE_BUCKET_SIZE else 0
        self.rest, self.oversized_at_end = inside, outsized


def _drain(order: list[int], own: int) -> list[tuple[int, int]]:
    """zero1 after the backward pass, in elements: (gradients, flat copy of the bucket) at each reduction. A gradient
    leaves its place when it is copied into the bucket; one larger than the bucket stays."""
    waiting, inside, kept, moments = sum(order), 0, 0, []
    for numel in order:
        if inside + numel > REDUCE_BUCKET_SIZE and inside:
            moments.append((waiting + kept, inside))
            inside, kept = 0, own
        inside += numel
        waiting -= numel if numel <= REDUCE_BUCKET_SIZE else 0
    return [*moments, (waiting + kept, inside)]


def _rows_share(shape: tuple[int, ...], world: int) -> int:
    """Elements of the fullest rank's rows, padding included."""
    return -(-shape[0] // world) * math.prod(shape[1:]) if shape else 1


def _gathered_zero3(profile: ModelProfile, timeline: Timeline) -> tuple[np.ndarray, np.ndarray]:
    """(elements that are whole, elements of the flat buffer that a gather is copied out of) in each interval.

    Every module that begins asks for another prefetch bucket, so that soon all that may live does.
    """
    num_blocks = max((p.block for p in profile.parameters), default=OUTSIDE) + 1
    size = [sum(p.numel for p in profile.parameters if p.block == block) for block in range(num_blocks)]
    outside = profile.numel - sum(size)
    comes_back = 2 * sum(size) >= STAGE3_MAX_REUSE_DISTANCE
    gathered, coming = np.zeros(len(timeline.blocks)), np.zeros(len(timeline.blocks))
    left = profile.numel
    for interval, (block, backward) in enumerate(zip(timeline.blocks, timeline.backward, strict=True)):
        if backward and block != OUTSIDE:
            left = min(left, outside + sum(size[: block + 1]))
        gathered[interval] = min(left, STAGE3_MAX_LIVE_PARAMETERS)
        if not backward or comes_back:
            coming[interval] = min(STAGE3_PREFETCH_BUCKET_SIZE, left)
    return gathered, coming
