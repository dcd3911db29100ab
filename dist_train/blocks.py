"""The repeated blocks of a model: where it is sharded, compiled and checkpointed. No model says so itself."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


def repeated_blocks(module: nn.Module) -> list[nn.Module]:
    """The members of the outermost ModuleList or Sequential containers that hold two or more layers of one class."""
    blocks: list[nn.Module] = []
    for child in module.children():
        members = list(child) if isinstance(child, nn.ModuleList | nn.Sequential) else []
        kinds = [type(member) for member in members if any(True for _ in member.parameters())]
        alike = [member for member in members if kinds.count(type(member)) > 1 and next(member.children(), None)]
        blocks.extend(alike)
        for inner in [member for member in members if member not in alike] if members else [child]:
            blocks.extend(repeated_blocks(inner))
    return blocks


def checkpoint_activations(module: nn.Module) -> int:
    """Make each block keep its inputs alone and compute the rest again in the backward pass (Chen et al. 2016).

    The parameters' names stay as they are. Returns the number of blocks.
    """
    blocks = repeated_blocks(module)
    for block in blocks:
        block.forward = functools.partial(_recomputed, block, block.forward)
    return len(blocks)


def _recomputed(block: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if block.training:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)
    return forward(*args, **kwargs)


def compile_blocks(module: nn.Module) -> int:
    """torch.compile on each block, one graph for all row lengths. Returns the number of blocks."""
    blocks = repeated_blocks(module)
    for block in blocks:
        block.compile(dynamic=True)
    return len(blocks)
