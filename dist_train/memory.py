"""Bytes that one rank needs at the peak of a training step, and bytes that it sends, from a profile. Torch-free."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from dist_train.memory_layout import LAYOUTS, Layout, Setting
from dist_train.model_profile import ModelProfile


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


def estimate(profile: ModelProfile, setting: Setting) -> Estimate:
    """The peak of one rank, the fullest one where they differ."""
    layout = LAYOUTS[setting.strategy](profile, setting)
    timeline = profile.timeline(layout.cached)
    lasting = _lasting(profile, layout)
    best = _Peak(lasting + int(profile.at(profile.evaluation, *setting.evaluation)) + layout.evaluation_gathered)
    best.temporaries = best.bytes - lasting - layout.evaluation_gathered
    best.copies = layout.evaluation_gathered
    for one in layout.passes:
        for shape in setting.later if one.later else setting.first:
            kept = float(profile.at(timeline.kept, *shape))
            peaks, starts = profile.at(timeline.peaks, *shape), profile.at(timeline.starts, *shape)
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


def state_bytes(profile: ModelProfile, setting: Setting) -> int:
    """What one rank holds between the backward pass and the optimizer's step: weights, gradients, optimizer state, and
    what the strategy holds beside them."""
    layout = LAYOUTS[setting.strategy](profile, setting)
    gradients = next(gradients for name, gradients, _, _ in layout.moments if name == "optimizer step")
    return _lasting(profile, layout) + gradients


def _lasting(profile: ModelProfile, layout: Layout) -> int:
    own = layout.parameters + layout.optimizer + layout.ema + layout.copies + layout.communication
    return own + profile.buffer_bytes


@dataclass
class _Peak:
    bytes: int
    moment: str = "evaluation"
    gradients: int = 0
    copies: int = 0
    activations: int = 0
    temporaries: int = 0
    communication: int = 0
