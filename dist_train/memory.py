"""Bytes that one rank needs under each strategy, and bytes that it sends: pure arithmetic over a model's profile.

docs/memory.md derives the formulas and names the lines of torch and DeepSpeed that cause each copy. Torch-free.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import numpy as np

from dist_train.model_profile import NO_GRADIENT, OUTSIDE, ModelProfile, Timeline

FP32 = 4
# As in the generated DeepSpeed config (deepspeed_config.py), in elements; a test compares them.
REDUCE_BUCKET = 50_000_000
PREFETCH_BUCKET = 50_000_000
PERSISTENCE_THRESHOLD = 10_000
MAX_REUSE_DISTANCE = 1_000_000_000
# DeepSpeed aligns each flat group to so many elements a rank (nccl_start_alignment_factor).
_ALIGNMENT = 2


@dataclass(frozen=True)
class Setting:
    """What the bytes depend on beside the model."""

    strategy: str
    world_size: int
    micro_batches: int
    shapes: tuple[tuple[int, int], ...]
    """(rows, padded length) of the micro-batches that may be the largest."""
    evaluation: tuple[int, int]
    """(rows, padded length) of the largest batch in evaluation."""
    optimizer_states: int = 2
    ema: bool = False
    offload: str | None = None
    bf16_communication: bool = False
    overlaps: bool = False
    """Whether collectives run beside the computation (GPUs), which keeps their buffers for longer."""


@dataclass(frozen=True)
class Estimate:
    """One rank's bytes at the moment of the peak, which they add up to, and what it sends in an optimizer step."""

    strategy: str
    parameters: int
    """This rank's share, or all of them."""
    gradients: int
    optimizer: int
    ema: int
    copies: int
    """What the strategy holds twice: fp32 partitions, gathered or small parameters, flattened gradients."""
    activations: int
    """What waits for the backward pass."""
    temporaries: int
    """Everything that the running operations hold beyond: logits, casts, gradients on their way."""
    communication: int
    """Buffers of the collectives."""
    peak: int
    moment: str
    """forward, backward, reduction, optimizer step or evaluation."""
    sent: int
    """Bytes that one rank sends in an optimizer step."""
    host: int
    """Bytes that offload moves to the CPU's memory, a rank."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(value: dict[str, Any]) -> Estimate:
        return Estimate(**{item.name: value[item.name] for item in fields(Estimate)})

    @property
    def state(self) -> int:
        """Parameters, gradients and optimizer state."""
        return self.parameters + self.gradients + self.optimizer


@dataclass
class Pass:
    """What a strategy holds in each interval of a forward and backward pass beside its lasting state, in bytes."""

    gradients: np.ndarray
    gathered: np.ndarray
    communication: np.ndarray
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


def estimate(profile: ModelProfile, setting: Setting) -> Estimate:
    """The peak of one rank, the fullest one where they differ."""
    layout = _LAYOUTS[setting.strategy](profile, setting)
    timeline = profile.timeline(layout.cached)
    lasting = layout.parameters + layout.optimizer + layout.ema + layout.copies + layout.communication
    lasting += profile.buffer_bytes
    best = _Peak(lasting + int(profile.at(profile.evaluation, *setting.evaluation)) + layout.evaluation_gathered)
    best.temporaries = best.bytes - lasting - layout.evaluation_gathered
    best.copies = layout.evaluation_gathered
    for shape in setting.shapes:
        kept = float(profile.at(timeline.kept, *shape))
        peaks, starts = profile.at(timeline.peaks, *shape), profile.at(timeline.starts, *shape)
        for one in layout.passes:
            own = starts if one.at_start else peaks
            total = own + one.gradients + one.gathered + one.communication
            index = int(total.argmax())
            if lasting + total[index] > best.bytes:
                best = _Peak(int(lasting + total[index]), "backward" if timeline.backward[index] else "forward")
                best.gradients, best.copies = int(one.gradients[index]), int(one.gathered[index])
                best.communication = int(one.communication[index])
                best.activations = int(min(own[index], kept))
                best.temporaries = int(own[index]) - best.activations
    for name, gradients, copies, communication in layout.moments:
        if lasting + gradients + copies + communication > best.bytes:
            best = _Peak(lasting + gradients + copies + communication, name)
            best.gradients, best.copies, best.communication = gradients, copies, communication
    return Estimate(
        strategy=setting.strategy,
        parameters=layout.parameters,
        gradients=best.gradients,
        optimizer=layout.optimizer,
        ema=layout.ema,
        copies=layout.copies + best.copies,
        activations=best.activations,
        temporaries=best.temporaries + profile.buffer_bytes,
        communication=layout.communication + best.communication,
        peak=best.bytes,
        moment=best.moment,
        sent=layout.sent,
        host=layout.host,
    )


@dataclass
class _Peak:
    bytes: int
    moment: str = "evaluation"
    gradients: int = 0
    copies: int = 0
    activations: int = 0
    temporaries: int = 0
    communication: int = 0


def _replicated(profile: ModelProfile, setting: Setting) -> Layout:
    """single and ddp. DDP's buckets hold the gradients all the time; while it does not synchronise (no_sync), the
    gradients gather outside of them first, and move into them in the last micro-batch."""
    trainable = FP32 * profile.trainable
    arrived = FP32 * _arrived(profile, profile.cached)
    nothing = np.zeros_like(arrived)
    distributed = setting.strategy == "ddp"
    buckets = trainable if distributed else 0
    passes = [Pass(buckets + (nothing if distributed and setting.micro_batches == 1 else arrived), nothing, nothing)]
    if setting.micro_batches > 1 and not distributed:
        passes = [Pass(nothing + trainable, nothing, nothing)]
    if setting.micro_batches > 1 and distributed:
        passes.append(Pass(2 * trainable - arrived, nothing, nothing))
    if setting.micro_batches > 2 and distributed:
        passes.append(Pass(nothing + 2 * trainable, nothing, nothing))
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
    """The weights lie in flat groups (matrices, vectors); each rank has a clone of its partition of each, with the
    optimizer's state. Gradients are copied into a bucket, summed from a flat copy of it, and what belongs to this
    rank's partition is copied out."""
    world, stage = setting.world_size, int(setting.strategy[-1])
    parts = [_flat_partition(group, world) for group in _flat_groups(profile)]
    partition = sum(parts)
    frozen = profile.numel - profile.trainable
    own = max(_touched(profile, world, rank) for rank in range(world))
    bucket = FP32 * REDUCE_BUCKET * (2 if setting.overlaps else 1)
    timeline = profile.cached
    arrived = FP32 * _arrived(profile, timeline)
    nothing = np.zeros_like(arrived)
    backward = np.array(timeline.backward)
    waiting = np.where(backward, bucket, 0.0)
    if stage == 1:
        first = Pass(arrived, nothing, waiting)
        full = Pass(nothing + FP32 * profile.trainable, nothing, waiting)
        passes = [full if setting.micro_batches > 1 else first]
        order = [p.numel for group in _flat_groups(profile) for p in group]
        gradients, copy = _drain(order, list(order))
        reduction = ("reduction", FP32 * (gradients + own), 0, bucket + FP32 * copy)
        moments = [reduction]
    else:
        order = [profile.parameters[index].numel for index in timeline.gradients if index != NO_GRADIENT]
        flushed = _flushes(order)
        held = np.zeros_like(arrived)
        at = 0
        copies = np.zeros_like(arrived)
        for interval, index in enumerate(timeline.gradients):
            held[interval] = FP32 * own if any(flushed[:at]) else 0.0
            if index != NO_GRADIENT:
                copies[interval] = FP32 * flushed[at]
                at += 1
        before = FP32 * own if setting.micro_batches > 1 else 0
        passes = [Pass(held + before, nothing, waiting + copies)]
        moments = [("reduction", FP32 * own + before, 0, bucket + FP32 * _rest(order))]
    moments.append(("optimizer step", FP32 * own, FP32 * max(parts, default=0), 0))
    reductions = setting.micro_batches if stage == 2 else 1
    wire = FP32 * profile.trainable // (2 if setting.bf16_communication else 1)
    optimizer = FP32 * setting.optimizer_states * partition
    offloaded = setting.offload is not None
    return Layout(
        parameters=FP32 * (sum(parts) * world + frozen),
        optimizer=0 if offloaded else optimizer,
        copies=0 if offloaded else FP32 * partition,
        ema=FP32 * profile.numel * setting.ema,
        passes=passes,
        moments=moments,
        sent=_ring(reductions * 2 * wire, world) + _ring(FP32 * profile.trainable, world),
        host=(optimizer + 3 * FP32 * partition) if offloaded else 0,
    )


def _zero3(profile: ModelProfile, setting: Setting) -> Layout:
    """Each tensor's share of ceil(numel / world) elements lies in one flat buffer, its gradients in another; small
    tensors stay whole. A module's weights are gathered when it runs, with those that follow up to the prefetch bucket,
    and kept until the backward pass where it comes back within the reuse distance."""
    world, timeline = setting.world_size, profile.cached
    share = sum(-(-p.numel // world) for p in profile.parameters)
    trained = sum(-(-p.numel // world) for p in profile.parameters if p.trainable)
    small = sum(p.numel for p in profile.parameters if p.numel <= PERSISTENCE_THRESHOLD)
    arrived = _arrived(profile, timeline)
    nothing = np.zeros_like(arrived)
    gathered, flat = _gathered_zero3(profile, timeline)
    order = [profile.parameters[index].numel for index in timeline.gradients if index != NO_GRADIENT]
    flushed = _flushes(order)
    scatter = np.zeros_like(arrived)
    at = 0
    for interval, index in enumerate(timeline.gradients):
        if index != NO_GRADIENT:
            scatter[interval] = flushed[at]
            at += 1
    on_host = {"parameters": share, "optimizer": 0}.get(setting.offload or "", 0)
    optimizer = FP32 * setting.optimizer_states * trained
    sub_group = max((sum(-(-p.numel // world) for p in group) for group in _flat_groups(profile)), default=0)
    return Layout(
        parameters=FP32 * (share - on_host),
        optimizer=0 if setting.offload else optimizer,
        copies=FP32 * small,
        communication=FP32 * REDUCE_BUCKET,
        ema=FP32 * share * setting.ema,
        passes=[
            Pass(
                nothing + (0 if setting.offload else FP32 * trained),
                FP32 * gathered,
                FP32 * (flat + scatter),
            )
        ],
        moments=[
            ("reduction", 0 if setting.offload else FP32 * trained, 0, FP32 * _rest(order)),
            ("optimizer step", FP32 * trained, 0 if setting.offload else FP32 * sub_group, 0),
        ],
        evaluation_gathered=int(FP32 * gathered.max(initial=0.0)),
        sent=setting.micro_batches
        * (
            _ring(2 * FP32 * profile.numel, world)
            + _ring(FP32 * profile.trainable // (2 if setting.bf16_communication else 1), world)
        ),
        host=(optimizer + 2 * FP32 * trained + FP32 * on_host) if setting.offload else 0,
    )


def _fsdp(profile: ModelProfile, setting: Setting) -> Layout:
    """Each tensor's rows are dealt out (ceil(rows / world) on the fullest rank). A block's weights are gathered before
    it runs, from one flat buffer, and dropped after it; in the backward pass the block before is gathered meanwhile.
    What lies outside the blocks stays gathered from the forward to the end of the backward pass."""
    world, timeline = setting.world_size, profile.uncached or profile.cached
    share = sum(_rows_share(p.shape, world) for p in profile.parameters)
    trained = sum(_rows_share(p.shape, world) for p in profile.parameters if p.trainable)
    num_blocks = max((p.block for p in profile.parameters), default=OUTSIDE) + 1
    full = dict.fromkeys(range(OUTSIDE, num_blocks), 0)
    reduced = dict(full)
    for parameter in profile.parameters:
        full[parameter.block] += world * _rows_share(parameter.shape, world)
        if parameter.trainable:
            reduced[parameter.block] += _rows_share(parameter.shape, world)
    size = len(timeline.blocks)
    gathered, moving, gradients = np.zeros(size), np.zeros(size), np.zeros(size)
    begun, begun_moving = np.zeros(size), np.zeros(size)
    arrived = dict.fromkeys(full, 0)
    sharded, last = (trained if setting.micro_batches > 1 else 0), None
    outside = full[OUTSIDE]
    for interval, (block, backward) in enumerate(zip(timeline.blocks, timeline.backward, strict=True)):
        inside = full[block] if block != OUTSIDE else 0
        ahead = full.get(block - 1, 0) if backward and block > 0 else 0
        if not backward and setting.overlaps:
            ahead = full.get(block + 1, 0)
        if backward and last is not None and block != last and last != OUTSIDE:
            # The block that has just ended: its whole gradients are summed from a flat copy of them.
            begun[interval] = outside + full[last]
            begun_moving[interval] = world * reduced[last] + reduced[last] + ahead
            if setting.micro_batches == 1:
                sharded += reduced[last]
            arrived[last] = 0
        waiting = world * reduced.get(last, 0) if backward and last not in (None, OUTSIDE) and last != block else 0
        if not backward and inside:
            begun[interval] = max(begun[interval], outside + 2 * inside)
        gathered[interval] = outside + inside + (2 * inside if not backward and setting.overlaps else 0)
        moving[interval] = ahead + waiting
        gradients[interval] = sharded + sum(arrived.values())
        index = timeline.gradients[interval]
        if index != NO_GRADIENT:
            arrived[profile.parameters[index].block] += profile.parameters[index].numel
        if backward and block != OUTSIDE:
            last = block
    ending = sum(arrived.values()) + sharded
    during = Pass(FP32 * gradients, FP32 * gathered, FP32 * moving)
    between = Pass(FP32 * (gradients * 0 + sharded * 0), FP32 * begun, FP32 * begun_moving, at_start=True)
    between.gradients = FP32 * gradients
    wire = FP32 * profile.trainable // (2 if setting.bf16_communication else 1)
    inner = profile.numel - sum(p.numel for p in profile.parameters if p.block == OUTSIDE)
    return Layout(
        parameters=FP32 * share,
        optimizer=FP32 * setting.optimizer_states * trained,
        ema=FP32 * share * setting.ema,
        cached=False,
        passes=[during, between],
        moments=[
            ("reduction", FP32 * ending, FP32 * outside, FP32 * (world + 1) * reduced[OUTSIDE]),
            ("optimizer step", FP32 * trained, 0, 0),
        ],
        evaluation_gathered=FP32 * (outside + 2 * max((full[b] for b in full if b != OUTSIDE), default=0)),
        sent=setting.micro_batches * (_ring(FP32 * (profile.numel + inner), world) + _ring(wire, world)),
    )


_LAYOUTS: dict[str, Callable[[ModelProfile, Setting], Layout]] = {
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


def _flat_groups(profile: ModelProfile) -> list[list[Any]]:
    """The optimizer's groups: matrices, vectors (optim.parameter_groups)."""
    trained = [parameter for parameter in profile.parameters if parameter.trainable]
    groups = [[p for p in trained if len(p.shape) >= 2], [p for p in trained if len(p.shape) < 2]]
    return [group for group in groups if group]


def _flat_partition(group: list[Any], world: int) -> int:
    """Elements of one rank's partition of a flat group, its padding included."""
    total = sum(parameter.numel for parameter in group)
    return -(-total // (_ALIGNMENT * world)) * _ALIGNMENT


def _touched(profile: ModelProfile, world: int, rank: int) -> int:
    """Elements of the tensors of which a part lies in the rank's partitions: their gradients are kept whole."""
    touched = 0
    for group in _flat_groups(profile):
        size, offset = _flat_partition(group, world), 0
        for parameter in group:
            if offset < (rank + 1) * size and offset + parameter.numel > rank * size:
                touched += parameter.numel
            offset += parameter.numel
    return touched


def _flushes(order: list[int]) -> list[int]:
    """Elements that leave the bucket when each gradient arrives (0: there was room)."""
    inside, flushed = 0, []
    for numel in order:
        full = inside + numel > REDUCE_BUCKET
        flushed.append(inside if full else 0)
        inside = numel if full else inside + numel
    return flushed


def _rest(order: list[int]) -> int:
    """Elements that are in the bucket when the last gradient has come."""
    inside = 0
    for numel in order:
        inside = numel if inside + numel > REDUCE_BUCKET else inside + numel
    return inside


def _drain(order: list[int], sizes: list[int]) -> tuple[int, int]:
    """Stage 1 after the backward pass: (whole gradients that still wait, elements of the flat copy) at the fullest
    reduction."""
    waiting, inside, worst = sum(sizes), 0, (0, 0)
    for numel in order:
        if inside + numel > REDUCE_BUCKET:
            worst = max(worst, (waiting, inside), key=sum)
            inside = 0
        inside += numel
        if numel <= REDUCE_BUCKET:
            waiting -= numel
    return max(worst, (waiting, inside), key=sum)


def _rows_share(shape: tuple[int, ...], world: int) -> int:
    """Elements of the fullest rank's rows, padding included."""
    return -(-shape[0] // world) * math.prod(shape[1:]) if shape else 1


def _gathered_zero3(profile: ModelProfile, timeline: Timeline) -> tuple[np.ndarray, np.ndarray]:
    """(elements that are whole, elements of the flat buffer of a gather on its way) in each interval."""
    blocks = sorted({p.block for p in profile.parameters})
    size = {b: sum(p.numel for p in profile.parameters if p.block == b) for b in blocks}
    outside, inner = size.get(OUTSIDE, 0), [b for b in blocks if b != OUTSIDE]
    later = 0
    kept: set[int] = set()
    for block in reversed(inner):
        if 2 * later < MAX_REUSE_DISTANCE:
            kept.add(block)
        later += size[block]
    gathered, flat = np.zeros(len(timeline.blocks)), np.zeros(len(timeline.blocks))
    for interval, (block, backward) in enumerate(zip(timeline.blocks, timeline.backward, strict=True)):
        own = size.get(block, 0)
        place = inner.index(block) if block in inner else (0 if not backward else len(inner))
        resident = {b for b in kept if (b < block if not backward else b <= block) or (backward and block == OUTSIDE)}
        ahead = inner[place + 1 :] if not backward else inner[:place][::-1]
        coming = min(PREFETCH_BUCKET, sum(size[b] for b in ahead if b not in resident))
        gathered[interval] = sum(size[b] for b in resident | ({block} if block in size else set())) + coming
        gathered[interval] = max(gathered[interval], own)
        flat[interval] = coming
        if block == OUTSIDE:
            gathered[interval] = max(gathered[interval], outside + sum(size[b] for b in resident))
    return gathered, flat


def with_strategy(setting: Setting, strategy: str) -> Setting:
    return replace(setting, strategy=strategy)
