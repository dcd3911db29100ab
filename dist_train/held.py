"""What a rank holds of the training state: flat ranges of named tensors, the same words for every strategy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Held:
    """Elements start … start+len(flat)-1 of the tensor `name`, flattened. `flat` is a view: what is written into it
    counts."""

    name: str
    shape: tuple[int, ...]
    start: int
    flat: Tensor
    replicated: bool
    """Whether every rank holds the same; else each element lies on one rank alone."""


def whole(name: str, tensor: Tensor) -> Held:
    """All of a tensor that every rank holds."""
    return Held(name, tuple(tensor.shape), 0, tensor.detach().view(-1), True)


def state_buffers(module: nn.Module) -> dict[str, Tensor]:
    """By name, those that belong to the training state. A buffer that is not persistent is no part of it, as it is none
    of torch's state_dict: data or constants, alike on every rank, made anew with the model and never changed."""
    left_out = non_persistent_buffers(module)
    return {name: buffer for name, buffer in module.named_buffers() if name not in left_out}


def non_persistent_buffers(module: nn.Module) -> set[str]:
    """Names of the buffers that are not persistent."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, part in module.named_modules()
        for name in part._non_persistent_buffers_set
    }


def equal_share(held: Iterable[Held], rank: int, world_size: int) -> list[Held]:
    """This rank's equal part of replicated ranges, which are taken to lie end to end."""
    entries = list(held)
    total = sum(entry.flat.numel() for entry in entries)
    low, high = rank * total // world_size, (rank + 1) * total // world_size
    parts, offset = [], 0
    for entry in entries:
        start, stop = max(low - offset, 0), min(high - offset, entry.flat.numel())
        offset += entry.flat.numel()
        if start < stop:
            parts.append(Held(entry.name, entry.shape, entry.start + start, entry.flat[start:stop], False))
    return parts


def allocate_state(optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor], kinds: Iterable[str]) -> None:
    """Zeros for the state that the optimizer makes at its first step, so that a checkpoint can be read into it."""
    kinds = list(kinds)
    for parameter in parameters:
        for kind in kinds:
            # The fused optimizers count their steps on the parameter's device.
            shape = () if kind == "step" else parameter.shape
            if kind not in optimizer.state[parameter]:
                optimizer.state[parameter][kind] = torch.zeros(shape, dtype=torch.float32, device=parameter.device)
