"""Which parameters share a learning rate, a weight decay and a first step: a pure function of names. Torch-free."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from dist_train.config import OptimConfig


@dataclass(frozen=True)
class Layers:
    """How deep each parameter lies."""

    depth: Mapping[str, int]
    """By name: 0 for the embeddings, 1 for the first block, num_blocks + 1 for the head."""
    num_blocks: int

    def named(self, depths: Iterable[int]) -> str:
        """For example `embeddings, blocks 0 to 3`; blocks are counted from 0, as in the parameters' names."""
        found = sorted(set(depths))
        blocks = [depth - 1 for depth in found if 1 <= depth <= self.num_blocks]
        words = ["embeddings"] if 0 in found else []
        # Neighbours differ from their place in the list by the same number.
        for _, run in itertools.groupby(enumerate(blocks), lambda pair: pair[1] - pair[0]):
            numbers = [block for _, block in run]
            words.append(f"block {numbers[0]}" if len(numbers) == 1 else f"blocks {numbers[0]} to {numbers[-1]}")
        return ", ".join([*words, *["head"] * (self.num_blocks + 1 in found)])


@dataclass(frozen=True)
class Group:
    """One parameter group of the optimizer."""

    names: tuple[str, ...]
    """In the model's order."""
    lr_scale: float
    """Its learning rate as a share of that of the step."""
    weight_decay: float
    first_step: int
    """Steps that are done before it learns."""


def group_parameters(parameters: Iterable[tuple[str, int]], layers: Layers, config: OptimConfig) -> list[Group]:
    """The optimizer's groups, from the embeddings to the head. parameters: (name, dimensions) of all that is trained.

    Matrices with weight decay; biases, norms and other vectors without. Layers of one rate are one group.
    """
    rates = _rates(layers.num_blocks, config)
    members: dict[tuple[int, bool], list[str]] = {}
    for name, dimensions in parameters:
        first_of_its_rate = rates.index(rates[layers.depth[name]])
        members.setdefault((first_of_its_rate, dimensions < 2), []).append(name)
    groups = []
    for (depth, is_vector), names in sorted(members.items()):
        lr_scale, first_step = rates[depth]
        groups.append(Group(tuple(names), lr_scale, 0.0 if is_vector else config.weight_decay, first_step))
    return groups


def _rates(num_blocks: int, config: OptimConfig) -> list[tuple[float, int]]:
    """(share of the learning rate, steps before it learns) of each depth.

    Layer-wise decay as in ELECTRA (Clark et al. 2020), gradual unfreezing as in ULMFiT (Howard and Ruder 2018).
    """
    decay, every = config.layer_decay or 1.0, config.unfreeze_every_steps or 0
    backbone = [(decay ** (num_blocks - depth), every * (num_blocks + 1 - depth)) for depth in range(num_blocks + 1)]
    return [*backbone, (1.0 if config.head_lr is None else config.head_lr / config.lr, 0)]


def describe_groups(
    parameters: Iterable[tuple[str, tuple[int, ...], bool]], layers: Layers, config: OptimConfig, steps: int
) -> list[str]:
    """One line a group and one for what is frozen; none where nothing but the two usual groups is.

    parameters: (name, shape, whether it is trained); steps: of the whole training.
    """
    shapes, frozen = {}, []
    for name, shape, trained in parameters:
        shapes[name] = shape
        if not trained:
            frozen.append(name)
    groups = group_parameters([(n, len(shape)) for n, shape in shapes.items() if n not in frozen], layers, config)
    if not frozen and all((group.lr_scale, group.first_step) == (1.0, 0) for group in groups):
        return []

    def counted(names: Collection[str]) -> str:
        where = layers.named(layers.depth[name] for name in names)
        elements = sum(math.prod(shapes[name]) for name in names)
        return f"{where}: {len(names)} parameter{'s' * (len(names) > 1)} of {elements:,} elements"

    lines = []
    for group in groups:
        start = f"learns from step {group.first_step + 1}"
        if group.first_step >= steps:
            start += f", which is after the last one ({steps})"
        rate = f"peak lr {config.lr * group.lr_scale:.3g}, weight decay {group.weight_decay:g}"
        lines.append(f"{counted(group.names)}, {rate}, {start}")
    if frozen:
        lines.append(f"{counted(frozen)}, frozen")
    return [f"optimizer      {line}" for line in lines]
